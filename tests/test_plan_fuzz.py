"""Damaged plan files give a plan that holds, or a clean error; `benchmarks/plan_file.py` tries 100,000."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rpcompile.errors import PlanFileError, ScheduleError
from rpcompile.plan import Plan
from rpcompile.plan_summary import summary
from tests.chains import chain, partition
from tests.mutated_plans import mutate
from tests.test_plan import plan_of


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_clean_errors(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_of((chain(3), partition("F0-1", "FB2-2", "B0-1"), 2, 2, "sync")).save(path)
    content, rng = path.read_bytes(), random.Random(seed)
    refused = 0
    for _ in range(500):
        path.write_bytes(mutate(content, rng))
        try:
            Plan.load(path).verify()
        except PlanFileError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
        try:
            looked_at = Plan.load(path, verify=False)
        except PlanFileError:
            continue
        try:
            assert str(looked_at)
            summary(looked_at)
        except ScheduleError:
            pass
    assert refused > 300
