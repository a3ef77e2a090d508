"""Low-precision compute with float32 masters, against plain PyTorch that does the same casts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

from rpcompile.errors import InvalidArgument
from tests import models, reference, training

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


def cast_forward_backward(
    master: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype, scale: float = 1.0
) -> torch.Tensor:
    """The reference: computes with a cast copy, whose gradients are cast back and summed in float32."""
    copied = copy.deepcopy(master)
    for parameter in copied.parameters():
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    batch = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}
    total = torch.zeros((), dtype=torch.float32)
    for index in range(training.MICROBATCHES):
        part = {name: value.chunk(training.MICROBATCHES)[index] for name, value in batch.items()}
        loss = reference.loss_of(copied(**part))
        # One factor: float16 cannot hold the scale alone.
        (loss * (scale / training.MICROBATCHES)).backward()
        total += loss.detach() / training.MICROBATCHES
    for parameter, cast in zip(master.parameters(), copied.parameters(), strict=True):
        if cast.grad is not None:
            grad = cast.grad.float()
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return total


def frozen_lora() -> models.Case:
    case = models.lora()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return case


@pytest.mark.parametrize(("key", "make"), [("mlp", models.mlp), ("lora", frozen_lora)])
def test_bf16_with_float32_masters_equals_the_same_casts(key: str, make: Any) -> None:
    case = models.build(make)
    plain = copy.deepcopy(case.model)
    for parameter in plain.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(BFLOAT16)
    with training.compile_case(case, key, compute_dtype=BFLOAT16) as compiled:
        for parameter in case.model.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else BFLOAT16)
        mine = optim.AdamW(compiled.parameters(), lr=1e-3, fused=True)
        theirs = optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, fused=True)
        for step in range(5):
            for _ in range(1 + step % 2):
                loss = compiled.forward_backward(**case.batch)
                assert torch.equal(loss, cast_forward_backward(plain, case.batch, BFLOAT16))
            compiled.clip_grad_norm_(0.5)
            nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.5)
            compiled.step(mine)
            theirs.step()
            mine.zero_grad()
            theirs.zero_grad()
            if step == 2:  # loading weights refreshes what is uploaded
                with torch.no_grad():
                    for model in (case.model, plain):
                        for parameter in model.parameters():
                            parameter.data.mul_(1.25)
        changed = 0
        for one, other in zip(case.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
            changed += bool(one.dtype == torch.float32 and not torch.equal(one, one.bfloat16().float()))
        assert changed  # masters hold more than bfloat16 does


def test_low_precision_models_get_float32_masters() -> None:
    case = models.build(models.mlp)
    case.model.bfloat16()
    with training.compile_case(case, "mlp", compute_dtype=BFLOAT16) as compiled:
        compiled.forward_backward(**case.batch)
        assert {p.dtype for p in case.model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in case.model.parameters()} == {torch.float32}
        assert compiled.plan.dtype == "bfloat16"


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_with_a_gradient_scaler_skips_what_overflows(fused: bool) -> None:
    case = models.build(models.mlp)
    plain = copy.deepcopy(case.model)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2) for _ in range(2)]
    with training.compile_case(case, "mlp", compute_dtype=FLOAT16, grad_scaler=scalers[0]) as compiled:
        made = [optim.AdamW(model.parameters(), 0.01, fused=fused) for model in (case.model, plain)]
        scheduler = optim.lr_scheduler.ExponentialLR(made[0], 1.0)
        skipped = 0
        for step in range(9):
            before = copy.deepcopy(plain.state_dict())
            loss = compiled.forward_backward(**case.batch)
            scale = scalers[1].scale(torch.ones(())).item()
            assert torch.equal(loss, cast_forward_backward(plain, case.batch, FLOAT16, scale))
            if step % 2:
                for scaler, optimizer in zip(scalers, made, strict=True):
                    scaler.unscale_(optimizer)
                mine = compiled.clip_grad_norm_(0.1)
                theirs = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
                assert torch.equal(mine, theirs) or not theirs.isfinite()
            compiled.step(made[0])
            scalers[1].step(made[1])
            scheduler.step()
            for scaler, optimizer in zip(scalers, made, strict=True):
                scaler.update()
                optimizer.zero_grad()
            assert scalers[0].state_dict() == scalers[1].state_dict()
            skipped += all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
            for one, other in zip(case.model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(one, other)
        assert 0 < skipped < 9
        assert not hasattr(made[0], "found_inf")


def test_plain_scaler_step_works_too() -> None:
    case = models.build(models.mlp)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with training.compile_case(case, "mlp", grad_scaler=scaler) as compiled:
        plain = copy.deepcopy(case.model)
        training.plain_forward_backward(plain, case.batch)
        compiled.forward_backward(**case.batch)
        for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad * 8)
        scaler.step(optim.SGD(compiled.parameters(), 0.1))
        optim.SGD(plain.parameters(), 0.1).step()
        for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"compute_dtype=torch.int8; it must be torch.bfloat16 or"):
        training.compile_case(models.build(models.mlp), "mlp", compute_dtype=torch.int8)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_evaluation_computes_with_the_masters_as_they_are_and_disturbs_no_step(mode: str) -> None:
    weights: list[list[torch.Tensor]] = []
    for evaluates in (False, True):
        case = models.build(models.mlp)
        with training.compile_case(case, "mlp", compute_dtype=BFLOAT16, mode=mode) as compiled:
            optimizer = optim.SGD(compiled.parameters(), lr=0.1)
            for _ in range(3):
                compiled.forward_backward(**case.batch)
                compiled.step(optimizer)
                optimizer.zero_grad()
                if evaluates:
                    found = [compiled(**case.batch) for _ in range(2)]
                    cast = copy.deepcopy(case.model).bfloat16()
                    with torch.no_grad():
                        parts = [
                            cast(case.batch["x"][i : i + 2].bfloat16(), case.batch["y"][i : i + 2])
                            for i in range(0, models.BATCH, 2)
                        ]
                    assert torch.equal(found[0], torch.stack(parts).mean())
                    assert torch.equal(found[0], found[1])
            tensors = [
                compiled._weights.for_evaluation(dict(case.model.named_parameters())) for _ in range(2)
            ]
            same = tensors[0]["layers.0.weight"] is tensors[1]["layers.0.weight"]
            assert same == (mode == "sync")
            weights.append([parameter.detach().clone() for parameter in case.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
