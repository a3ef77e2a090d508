"""Outputs and losses of microbatches put together are those of the whole batch, whatever their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rpcompile.errors import BatchError
from tests import models, training

SHAPES = ("loss", "logits_SBV", "logits_NV", "positions_S", "sums_S", "first_VB", "right", "mean_V")


class Shapes(nn.Module):
    """Returns tensors whose batch dimension is first, in the middle, last, part of another or not there."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.head(self.layer(self.table(x)).relu())
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        return (
            loss,
            logits.transpose(0, 1),
            logits.flatten(0, 1),
            torch.arange(x.shape[1], dtype=torch.float32) / 3,
            logits.mean((0, 2)),
            logits[:, 0].T,
            (logits.argmax(-1) == y).sum(),
            logits.mean((0, 1)),
        )


def shapes() -> models.Case:
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(0, 11, (8, 6), generator=generator) for name in "xy"}
    return models.Case(Shapes(), batch)


@pytest.mark.parametrize("rows", [8, 7, 3])
def test_every_output_is_that_of_the_whole_batch(rows: int) -> None:
    case = models.build(shapes)
    batch = {name: value[:rows] for name, value in case.batch.items()}
    whole = case.model(**batch)
    with training.compile_case(case, "shapes") as compiled:
        found = [compiled(**batch)]
        if rows >= training.MICROBATCHES:
            loss, outputs = compiled.forward_backward(**batch, return_outputs=True)
            assert torch.equal(outputs[0], loss)
            found.append(outputs)
    for outputs in found:
        for name, mine, theirs in zip(SHAPES, outputs, whole, strict=True):
            assert mine.dtype == theirs.dtype, name
            torch.testing.assert_close(mine, theirs.detach(), msg=name)
        assert torch.equal(outputs[3], whole[3])


class Pairs(nn.Module):
    """Its batch is fixed: rows are taken two by two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.head(self.layer(x).view(2, 2, 4).flatten(1))
        scale = torch.full((2,), 3.0)
        return functional.cross_entropy(logits, y), logits, logits.T, logits.flatten(), scale


def pairs() -> models.Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator)
    return models.Case(Pairs(), {"x": x, "y": torch.randint(0, 3, (8,), generator=generator)})


@pytest.mark.parametrize("rows", [12, 8, 6, 2])
def test_a_fixed_batch_is_joined_too(rows: int) -> None:
    case = models.build(pairs)
    batch = {name: torch.cat([value, value])[:rows] for name, value in case.batch.items()}
    parts = [case.model(x, y) for x, y in zip(batch["x"].split(2), batch["y"].split(2), strict=True)]
    with training.compile_case(case, "pairs") as compiled:
        outputs = compiled(**batch)
    torch.testing.assert_close(outputs[0], torch.stack([part[0] for part in parts]).mean().detach())
    for index, dim in ((1, 0), (2, 1), (3, 0)):
        torch.testing.assert_close(outputs[index], torch.cat([part[index] for part in parts], dim).detach())
    assert torch.equal(outputs[4], torch.full((2,), 3.0))


def test_with_a_token_count_the_loss_is_the_sum_wherever_it_is_returned() -> None:
    case = models.make("qwen3-tied")
    labels = case.batch["labels"].clone()
    labels[:3, 4:] = -100
    batch: dict[str, Any] = {
        "input_ids": case.batch["input_ids"],
        "labels": labels,
        "num_items_in_batch": (labels[:, 1:] != -100).sum(),
    }
    whole = case.model(**batch).loss.detach()
    with training.compile_case(models.Case(case.model, batch), "counted-tied") as compiled:
        torch.testing.assert_close(compiled(**batch).loss, whole)
        loss, outputs = compiled.forward_backward(**batch, return_outputs=True)
        torch.testing.assert_close(loss, whole)
        assert torch.equal(outputs.loss, loss)


def test_a_batch_without_many_divisors_is_evaluated_in_microbatches() -> None:
    pair = training.pair()
    batch = {name: value[:7] for name, value in pair.batch.items()}
    with pair.compiled as compiled:
        torch.testing.assert_close(compiled(**batch), pair.plain(**batch).detach())
        assert list(compiled._evaluations) == [training.MICROBATCHES]
        with pytest.raises(BatchError, match=r"^the batch is empty$"):
            compiled(**{name: value[:0] for name, value in batch.items()})
