"""Each package names in ``__all__`` what the packages above it may import; what it does not name is its own."""

from __future__ import annotations

import ast
import importlib
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
