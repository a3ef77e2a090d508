"""Random module graphs: staged execution, cut anywhere, equals eager PyTorch bit for bit, or is refused."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from rpcompile.errors import UnsupportedModel
from rpcompile.passes.find_cuts import FindCuts
from tests import random_models, reference, staged
from tests.random_models import Step

REFUSALS = ("in place", "depends on the buffer 'count'", "depends on the buffer 'average'")


@dataclass(frozen=True)
class AnyCuts(FindCuts):
    """Up to six of all legal cuts, instead of those worth considering."""

    seed: int = 0

    def _choose(self, graph: object) -> list[int]:
        legal = sorted(graph._crossing)  # type: ignore[attr-defined]
        return sorted(random.Random(self.seed).sample(legal, min(6, len(legal))))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(program=random_models.steps(), kept=st.integers(1, 4), seed=st.integers(0, 99))
def test_staged_execution_equals_eager(program: tuple[Step, ...], kept: int, seed: int) -> None:
    case = random_models.case(program, kept)
    try:
        loss = reference.forward_backward(copy.deepcopy(case.model), case.batch, 4, random=True)
    except RuntimeError:
        assume(False)
        return
    assume(loss.isfinite())
    try:
        staged.check_parity(case, partitions=3, find_cuts=AnyCuts(seed=seed))
    except UnsupportedModel as refused:
        assert any(reason in str(refused) for reason in REFUSALS), refused
