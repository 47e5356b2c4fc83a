"""Every check has a test with a fault that triggers it, marked with its id."""

import ast
import functools
from pathlib import Path

import pytest

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY


@functools.cache
def covered_ids() -> set[str]:
    """Returns the check ids that tests name in `@pytest.mark.fault(…)` or in a dict FAULTS, as a key or as the first
    element of a value."""
    found: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found |= {str(ast.literal_eval(argument)) for argument in node.args}
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAULTS":
                found |= _ids(node.value)
    return found


def _ids(table: ast.expr | None) -> set[str]:
    assert isinstance(table, ast.Dict)
    ids = [value.elts[0] for value in table.values if isinstance(value, ast.Tuple)]
    strings = [node.value for node in (*table.keys, *ids) if isinstance(node, ast.Constant)]
    return {str(word) for word in strings} & REGISTRY.keys()


@pytest.mark.parametrize("id", REGISTRY)
def test_every_check_has_a_fault(id: str) -> None:
    # Informational checks find no problem, so no fault triggers them.
    assert id in covered_ids() | INFORMATION, f"no test is marked with fault({id!r})"


INFORMATION = {"L-09", "G-18", "G-20", "N-17"}


def test_marks_name_checks() -> None:
    assert covered_ids() <= REGISTRY.keys()
