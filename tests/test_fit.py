"""What `fit` tries at one size; whole answers are in test_cli.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from rpcompile.fit import _Search
from rpcompile.planner import CapturedModel
from tests import chains


class Planned:
    """A model whose plans take 15 bytes of the host, and 8 where they are searched for."""

    def bind(self, *_: Any, **__: Any) -> Any:
        return chains.chain(3)

    def plan(self, chain: Any, options: Any, progress: bool) -> Any:
        needed = 15 if options.effort is None else 8
        return SimpleNamespace(prediction=SimpleNamespace(host_peak_bytes=needed))


@pytest.mark.parametrize(
    ("host_bytes", "problem"), [(15, None), (8, None), (7, "need 8 B of"), (3, "need 15 B")]
)
def test_stages_that_leave_less_on_the_host_are_searched_for(host_bytes: int, problem: str | None) -> None:
    captured = cast("CapturedModel", Planned())
    search = _Search(captured, chains.HARDWARE, "batch", {}, 2, 4, host_bytes, {})
    found = search.problem(1)
    assert problem in found if problem and found else found is problem
