"""What a program would pass over in silence is said or honoured: hooks, and what changed since compile."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.errors import BatchError, ExecutionError, PlanMismatch, RpcompileError, UnsupportedModel
from tests import models, training


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_parameter_that_is_frozen_later_is_trained_no_longer(mode: str) -> None:
    pair = training.pair(mode=mode)
    with pair.compiled as compiled:
        optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in (pair.model, pair.plain)]
        for step in range(4):
            if step == 2:
                compiled.wait()
                for model in (pair.model, pair.plain):
                    model.layers[1].weight.requires_grad_(False)
                frozen = pair.model.layers[1].weight.clone()
            if mode == "sync":
                pair.forward_backward(step)
                training_step(optimizers[1])
            else:
                compiled.forward_backward(**pair.batch_of(step))
            compiled.step(optimizers[0])
            optimizers[0].zero_grad()
        assert torch.equal(pair.model.layers[1].weight, frozen)
        assert not torch.equal(pair.model.layers[2].weight, models.make("mlp").model.layers[2].weight)
        if mode == "sync":
            pair.assert_equal()


def training_step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _unfrozen(model: Any) -> None:
    model.layers[0].bias.requires_grad_(True)


def _reshaped(model: Any) -> None:
    model.layers[1].weight = nn.Parameter(torch.zeros(8, 16))


def _without_bias(model: Any) -> None:
    model.layers[1] = nn.Linear(16, 16, bias=False)


def _doubled(model: Any) -> None:
    model.double()


def _hooked(model: Any) -> None:
    model.layers[1].weight.register_hook(lambda gradient: 2 * gradient)


def _accumulating(model: Any) -> None:
    model.layers[1].weight.register_post_accumulate_grad_hook(lambda _: None)


def _module_hooked(model: Any) -> None:
    model.layers[1].register_full_backward_hook(lambda *_: None)


CHANGES: list[tuple[Callable[[Any], None], type[RpcompileError], str]] = [
    (
        _unfrozen,
        PlanMismatch,
        r"^layers\.0\.bias requires a gradient, and did not when the model was compiled",
    ),
    (
        _reshaped,
        PlanMismatch,
        r"^layers\.1\.weight has shape \(8, 16\), and had \(16, 16\) when the model was",
    ),
    (
        _without_bias,
        PlanMismatch,
        r"^layers\.1\.bias is gone, and was part of Mlp when the model was compiled",
    ),
    (
        _doubled,
        PlanMismatch,
        r"^layers\.0\.weight is float64, and was float32 when .*; call rpcompile\.compile",
    ),
    (_hooked, UnsupportedModel, r"^layers\.1\.weight has a hook on its gradient, which would not be called"),
    (
        _accumulating,
        UnsupportedModel,
        r"^layers\.1\.weight has a hook on its gradient, .*remove the hook and",
    ),
    (_module_hooked, UnsupportedModel, r"^layers\.1 has a backward hook, which would not be called"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES)
def test_changes_that_the_program_does_not_have_are_named(
    change: Callable[[Any], None], error: type[RpcompileError], message: str
) -> None:
    case = models.make("mlp")
    case.model.layers[0].bias.requires_grad_(False)
    with training.compile_case(case, "mlp-frozen-bias") as compiled:
        change(case.model)
        with pytest.raises(error, match=message):
            compiled.forward_backward(**case.batch)
        assert all(parameter.grad is None for parameter in case.model.parameters())


def test_sparse_gradients_and_hooks_are_refused_before_anything_is_captured() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(UnsupportedModel, match=r"^0 makes sparse gradients; create it with sparse=False$"):
        rpcompile.compile(model, 2, example_inputs=torch.zeros(8, dtype=torch.long))
    model = models.make("mlp").model
    _module_hooked(model)
    with pytest.raises(UnsupportedModel, match=r"^layers\.1 has a backward hook"):
        rpcompile.compile(model, 2, example_inputs=models.make("mlp").batch)


def test_an_input_that_requires_a_gradient_is_refused_where_it_would_get_one() -> None:
    pair = training.pair()
    with pair.compiled as compiled:
        batch = {**pair.batch, "x": pair.batch["x"].clone().requires_grad_()}
        with pytest.raises(BatchError, match=r"^input 'x' requires a gradient, and inputs get none; pass it"):
            compiled.forward_backward(**batch)
        assert compiled(**batch) > 0


def test_another_mode_than_the_captured_one_is_warned_of() -> None:
    pair = training.pair()
    with pair.compiled as compiled:
        pair.model.layers[1].eval()
        with pytest.warns(
            RuntimeWarning, match=r"^layers\.1 of Mlp is in eval mode, but trains as .*training"
        ):
            compiled.forward_backward(**pair.batch)
        pair.model.eval()
        with pytest.warns(RuntimeWarning, match=r"^Mlp is in eval mode") as caught:
            compiled.forward_backward(**pair.batch)
        assert caught[0].filename == __file__
        pair.model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled.forward_backward(**pair.batch)
            assert compiled(**pair.batch) > 0


def test_a_closed_model_says_so_at_once() -> None:
    pair = training.pair()
    optimizer = torch.optim.SGD(pair.model.parameters(), 0.1)
    with pair.compiled as compiled:
        compiled.forward_backward(**pair.batch)
        compiled.step(optimizer)
    weights = copy.deepcopy(pair.model.state_dict())
    for call in (
        lambda: compiled.forward_backward(**pair.batch),
        lambda: compiled(**pair.batch),
        lambda: compiled.step(optimizer),
    ):
        with pytest.raises(
            ExecutionError, match=r"^this compiled Mlp has been closed, by close\(\) or at the"
        ):
            call()
    assert all(torch.equal(value, weights[name]) for name, value in pair.model.state_dict().items())
    compiled.close()
