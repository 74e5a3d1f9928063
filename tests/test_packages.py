"""Each package names in ``__all__`` what the packages above it may import; what it does not name is its own."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import celery_idem

ROOT = Path(celery_idem.__file__).parent
PACKAGES = ("core", "engine", "integration", "operate")


def imported(file: Path) -> set[tuple[str, str]]:
    """(package, module) of every import of ours in a file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
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
    assert public - outside == set(), "named, and nobody else needs it"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Also not inside a function, or for types only."""
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
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Compare) and reads(node)), f"{file}:{node.lineno}"
            if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Match)):
                condition = node.subject if isinstance(node, ast.Match) else node.test
                assert not reads(condition), f"{file}:{node.lineno}"
