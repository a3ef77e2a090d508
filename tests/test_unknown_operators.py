"""Operators without a FLOP formula: their share of bytes and time, and who is told."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.ir import Hardware
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.unknown_operators import unknown_shares
from tests.small_captures import BATCH, Chain, Function, capture_of

HARDWARE = Hardware("toy", 2**30, 2**30, 1e3, 1e2, 1e9, 1e9, 0.0, {})


@torch.library.custom_op("rpcompile_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda context, gradient: 2 * gradient)
NAME = "rpcompile_tests.doubled.default"


def test_shares_of_bytes_and_time() -> None:
    model = Chain(nn.Linear(8, 8, bias=False), Function(lambda x: doubled(x) + doubled(x)))
    costed = EstimateCosts().run(capture_of(model, {"x": torch.zeros(4, 8)}, BATCH))
    (share,) = unknown_shares(costed, {"batch": 4}, HARDWARE)
    tensor, weight = 4 * 8 * 4, 8 * 8 * 4
    # Each call: forward 1 in, 1 out; backward the gradient, what it may keep (in and out), 1 out.
    unknown = 2 * (2 + 4) * tensor
    # Forward; backward, of the weight alone; two gradients of its result are added up.
    linear = (2 * tensor + weight) + (2 * tensor + weight) + 3 * tensor
    add = 3 * tensor + 3 * tensor
    assert (share.operator, share.calls) == (NAME, 2)
    assert share.byte_share == pytest.approx(unknown / (unknown + linear + add))
    # 2 x 4 x 8 x 8 FLOPs at 1000 a second take less than the bytes at 100.
    assert share.time_share == pytest.approx(share.byte_share)
    assert str(share).startswith(f"{NAME} (2 calls, ")


def test_nothing_unknown() -> None:
    costed = EstimateCosts().run(capture_of(nn.Linear(8, 8), {"input": torch.zeros(4, 8)}))
    assert unknown_shares(costed, {}, HARDWARE) == ()


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(self.b(self.a(x).relu())[:, :1]).sum()


@pytest.mark.parametrize(("width", "level"), [(8, logging.WARNING), (4096, logging.INFO)])
def test_a_plan_warns_of_a_large_share(width: int, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rpcompile"):
        rpcompile.compile(
            Model(width), gpus=1, microbatches=1, example_inputs={"x": torch.zeros(4, 8)}
        ).close()
    (record,) = [item for item in caplog.records if "no FLOP formula" in item.getMessage()]
    assert record.levelno == level
    assert f"{NAME} (1 calls, " in record.getMessage()
    assert record.getMessage().endswith("the prediction may be low")
