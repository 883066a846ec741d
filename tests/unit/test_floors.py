"""Which program imports which: one floor down, never up or sideways. A reader, and a ConfigMap, need no other file than these."""

import ast
import sys

import pytest

from tests.manifests import ROOT

FLOORS = {
    "mncni.py": set(),
    "kube.py": {"mncni"},
    "agent.py": {"mncni", "kube"},
    "nodeipam.py": {"mncni", "kube"},
    "cnisnoop.py": set(),
}


def imported(path):
    """The first word of each module that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", FLOORS)
def test_a_program_imports_the_floors_below_it_and_the_standard_library(name):
    known = set(sys.stdlib_module_names) if hasattr(sys, "stdlib_module_names") else None  # since Python 3.10
    found = imported(ROOT / name)
    assert found & {path.stem for path in ROOT.glob("*.py")} == FLOORS[name]
    assert known is None or found - known == FLOORS[name]


def test_every_program_has_its_floor():
    assert {path.name for path in ROOT.glob("*.py")} == set(FLOORS)
