"""Each package lists in ``__all__`` the modules that other packages may import. The others are private to it."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import celery_idem
from celery_idem.core.signatures import parsed

ROOT = Path(celery_idem.__file__).parent
PACKAGES = ("core", "engine", "integration", "operate")


def imported(file: Path) -> set[tuple[str, str]]:
    """(package, module) of every import of celery_idem in a file."""
    found = set()
    for node in ast.walk(parsed(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("celery_idem."):
            _, package, *rest = str(node.module).split(".")
            names = rest[:1] or [alias.name for alias in node.names]
            found |= {(package, name) for name in names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_only_public_modules_are_imported_from_elsewhere(package: str) -> None:
    public = set(importlib.import_module(f"celery_idem.{package}").__all__)
    outside = {
        name
        for file in ROOT.rglob("*.py")
        if file.relative_to(ROOT).parts[0] not in (package, "testing")
        for where, name in imported(file)
        if where == package
    }
    assert outside - public == set()
    assert public - outside == set(), "named, and no other package imports it"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside a function and imports for types only count too."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("celery_idem", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 90
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_no_branch_reads_the_advice_of_a_receipt() -> None:
    """`next` is text for people and models. Programs compare `status` and `code`."""

    def reads(node: ast.AST) -> bool:
        return any(
            (isinstance(each, ast.Attribute) and each.attr == "next")
            or (
                isinstance(each, ast.Subscript)
                and isinstance(each.slice, ast.Constant)
                and each.slice.value == "next"
            )
            for each in ast.walk(node)
        )

    for file in ROOT.rglob("*.py"):
        for node in ast.walk(parsed(file.read_text())):
            assert not (isinstance(node, ast.Compare) and reads(node)), f"{file}:{node.lineno}"
            if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Match)):
                condition = node.subject if isinstance(node, ast.Match) else node.test
                assert not reads(condition), f"{file}:{node.lineno}"


def test_only_a_hold_touches_what_is_private_of_it() -> None:
    """No other file of the package, the tests and the benchmarks uses a private attribute of a hold or a claim."""
    claim = ROOT / "engine" / "claim.py"
    private = {
        node.attr
        for node in ast.walk(parsed(claim.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) == "self"
    }
    assert {"_seen", "_phase", "_write"} <= private
    for file in (
        file for place in ("celery_idem", "tests", "benchmarks") for file in TOP.glob(f"{place}/**/*.py")
    ):
        if file == claim:
            continue
        for node in ast.walk(parsed(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private:
                owner = ast.unparse(node.value).split(".")[-1].rstrip("()")
                assert owner not in HOLDS, f"{file}:{node.lineno}: {ast.unparse(node)}"


HOLDS = {
    "claim",
    "hold",
    "held",
    "own",
    "claimed",
    "shadow",
    "first",
    "lives",
    "ended",
    "long",
    "short",
    "idem_claim",
}
"""Names of variables that hold a claim."""

TOP = ROOT.parent


def test_no_branch_reads_text_for_people() -> None:
    """Some fields are text for people, for example the reason of a doubt. Programs read the field beside it."""
    texts = {"missing", "reason", "what", "evidence", "says"}
    parsing = {
        "startswith",
        "endswith",
        "removeprefix",
        "removesuffix",
        "split",
        "partition",
        "find",
        "index",
    }

    def read(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in texts

    for file in ROOT.rglob("*.py"):
        for node in ast.walk(parsed(file.read_text())):
            compared = isinstance(node, ast.Compare) and any(map(read, (node.left, *node.comparators)))
            taken_apart = isinstance(node, ast.Attribute) and node.attr in parsing and read(node.value)
            assert not compared, f"{file}:{node.lineno}"
            assert not taken_apart, f"{file}:{node.lineno}"
