"""Cost files: the same numbers as binding the model, without torch; damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rpcompile.cost_file import CostFile
from rpcompile.errors import InvalidArgument
from rpcompile.hardware import lookup
from rpcompile.planner import CapturedModel, ExampleInputs, capture_model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.down(torch.relu(self.up(x))) - target).square().mean()


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(Small(), ExampleInputs.of({"x": torch.zeros(4, 8), "target": torch.zeros(4, 8)}))


@pytest.fixture
def saved(captured: CapturedModel, tmp_path: Path) -> Path:
    captured.save_costs(tmp_path / "costs.json")
    return tmp_path / "costs.json"


def test_totals_are_those_of_binding_at_any_size(captured: CapturedModel, saved: Path) -> None:
    loaded = CostFile.load(saved)
    for batch in (1, 4, 1000):
        chain = captured.bind(lookup("rtx4090"), {"batch": batch})
        totals = loaded.totals({"batch": batch})
        for segment in chain.segments:
            assert totals[segment.name]["forward_flops"] == segment.forward_flops
            assert totals[segment.name]["backward_flops"] == segment.backward_flops
    first = next(name for name in totals if totals[name]["forward_flops"])
    assert first  # a linear layer of 8 x 32 on 1000 rows is 2 * 8 * 32 * 1000
    assert sum(found["forward_flops"] for found in totals.values()) >= 2 * 2 * 8 * 32 * 1000


def test_expressions_are_those_that_were_priced(captured: CapturedModel, saved: Path) -> None:
    loaded = CostFile.load(saved)
    parsed = loaded.parsed()
    for segment in loaded.segments:
        for operator in segment.operators:
            cost = captured.costed.costs[operator.node]
            assert parsed[operator.forward_flops].text == str(cost.forward_flops)
            assert parsed[operator.saved_bytes].text == str(cost.saved_bytes)
            assert operator.source == cost.source


def test_reading_needs_no_torch(saved: Path) -> None:
    program = (
        "import sys; from rpcompile.cost_file import CostFile\n"
        f"print(CostFile.load({str(saved)!r}).totals({{'batch': 3}}) != {{}}, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expressions": ["__import__('os')"]}, "only numbers, the sizes"),
        ({"expressions": ["0"]}, "is expression . of 1"),
        ({"format": "other"}, "has format 'other' version 1"),
        ({"version": 2}, "version 2; this rpcompile reads 'rpcompile.costs' version 1"),
        ({"extra": 1}, "unknown field `extra`"),
    ],
)
def test_damage_is_named(saved: Path, change: dict, message: str) -> None:
    saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
    with pytest.raises(InvalidArgument, match=message):
        CostFile.load(saved)


def test_sizes_out_of_range(saved: Path) -> None:
    with pytest.raises(InvalidArgument, match="batch=0 is outside the captured range 1 to"):
        CostFile.load(saved).totals({"batch": 0})
    with pytest.raises(InvalidArgument, match="batch=None"):
        CostFile.load(saved).totals({})
