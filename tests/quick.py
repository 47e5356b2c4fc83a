"""Marks the parameters that the quick tests leave out."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Returns `values` as parameters of a test, all slow except `quick`, which must be among them.

    A tuple holds the values of several parameters.
    """
    values = list(values)
    assert all(value in values for value in quick), f"{quick} are not all among {values}"
    return [value if value in quick else pytest.param(*_row(value), marks=pytest.mark.slow) for value in values]


def _row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
