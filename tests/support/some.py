"""Tables of cases that differ by a size or a target: `make test` runs some of each, `make test-whole` all."""

from collections.abc import Sequence
from typing import Any

import pytest


def some_of(cases: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """``cases`` for pytest.mark.parametrize, those that are not ``kept`` marked whole."""
    assert all(case in cases for case in kept)
    rest = [case for case in cases if case not in kept]
    marked = [pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.whole) for case in rest]
    return [*kept, *marked]
