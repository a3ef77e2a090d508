"""Losses outside the model, weights of microbatches, and outputs on request."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rpcompile.errors import InvalidArgument
from rpcompile.ir import InputSpec
from rpcompile.runtime import batches
from tests import models, reference, training


class Scores(nn.Module):
    """Returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(x)}


class WeightedLoss(nn.Module):
    """A module with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0]))

    def forward(self, outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs["scores"], labels, self.weight)


def scores() -> models.Case:
    batch = models.mlp().batch
    return models.Case(Scores(), {"x": batch["x"], "labels": batch["y"]})


def test_equal_microbatches_are_divided_by_their_number_and_not_weighed() -> None:
    """A loss / 3 has other bits than a loss * (1 / 3)."""
    spec = InputSpec("x", "x", ("batch",), "float32", 0)
    capture: Any = SimpleNamespace(inputs=(spec,), outputs=("loss",))
    parts = [{"x": torch.zeros(rows)} for rows in (2, 2, 2)]
    assert batches.row_weights(capture, parts) is None
    assert batches.row_weights(capture, [*parts, {"x": torch.zeros(4)}]) == [0.2, 0.2, 0.2, 0.4]
    losses = [torch.tensor(value) for value in (1.7, 2.3, 0.9)]
    expected = losses[0] / 3 + losses[1] / 3 + losses[2] / 3
    assert not torch.equal(expected, sum(loss * (1 / 3) for loss in losses))
    assert torch.equal(
        batches.total_loss(capture, [{"loss": loss} for loss in losses], None, False), expected
    )


def test_loss_fn_is_part_of_the_last_stage() -> None:
    case, loss_fn = models.build(scores), WeightedLoss()
    plain = copy.deepcopy(case.model)
    expected = torch.zeros(())
    for x, labels in zip(case.batch["x"].chunk(4), case.batch["labels"].chunk(4), strict=True):
        loss = loss_fn(plain(x), labels) / 4
        loss.backward()
        expected += loss.detach()
    with training.compile_case(case, "scores", loss_fn=loss_fn) as compiled:
        assert compiled.model is case.model
        loss, outputs = compiled.forward_backward(**case.batch, return_outputs=True)
        assert torch.equal(loss, expected)
        for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        assert set(outputs[1]) == {"scores"}
        expected_scores = torch.cat([plain(x)["scores"] for x in case.batch["x"].chunk(4)])
        assert torch.equal(outputs[1]["scores"], expected_scores)
        evaluated = compiled(**case.batch)
        assert torch.equal(evaluated[1]["scores"], expected_scores)
        optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
        compiled.step(optimizer)
        assert torch.equal(compiled.state_dict()["layers.0.weight"], case.model.layers[0].weight)


def test_loss_fn_takes_the_last_position_as_labels_and_names_what_it_lacks() -> None:
    case = models.build(scores)
    positions = models.Case(case.model, tuple(case.batch.values()))  # type: ignore[arg-type]
    loss_fn = WeightedLoss()
    with training.compile_case(positions, "positions", loss_fn=loss_fn) as compiled:
        assert compiled.forward_backward(*positions.batch) > 0
    unlabelled = models.Case(case.model, {"x": case.batch["x"]})
    with pytest.raises(InvalidArgument, match=r"loss_fn needs labels, and the batch has \['x'\]"):
        training.compile_case(unlabelled, "unlabelled", loss_fn=loss_fn)


def summed_loss(
    outputs: dict[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    return functional.cross_entropy(outputs["scores"], labels, reduction="sum") / num_items_in_batch


def test_loss_fn_gets_the_count_and_uneven_microbatches_are_exact() -> None:
    case = models.build(scores)
    labels = case.batch["labels"].clone()
    labels[:3] = -100
    batch = {"x": case.batch["x"], "labels": labels, "num_items_in_batch": (labels != -100).sum()}
    plain = copy.deepcopy(case.model)
    whole = functional.cross_entropy(plain(batch["x"])["scores"], labels)
    whole.backward()
    with training.compile_case(models.Case(case.model, batch), "counted", loss_fn=summed_loss) as compiled:
        torch.testing.assert_close(compiled.forward_backward(**batch), whole.detach())
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_hugging_face_token_counts_equal_the_same_weighting_bit_for_bit() -> None:
    case = models.make("qwen3-lora")
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labels = case.batch["labels"].clone()
    labels[:3, 4:] = -100
    count = (labels[:, 1:] != -100).sum()
    batch = {**case.batch, "labels": labels, "num_items_in_batch": count}
    plain, unsplit = copy.deepcopy(case.model), copy.deepcopy(case.model)
    expected = torch.zeros(())
    for index in range(4):
        part = {name: v.chunk(4)[index] if v.ndim else v for name, v in batch.items()}
        loss = plain(**part).loss
        loss.backward()
        expected += loss.detach()
    whole = unsplit(**{**case.batch, "labels": labels}).loss
    whole.backward()
    with training.compile_case(models.Case(case.model, batch), "counted-lora") as compiled:
        loss, outputs = compiled.forward_backward(**batch, return_outputs=True)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    for name, mine in case.model.named_parameters():
        theirs = plain.get_parameter(name)
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad), name
            torch.testing.assert_close(mine.grad, unsplit.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    rows = [plain(input_ids=ids).logits for ids in case.batch["input_ids"].chunk(4)]
    assert torch.equal(outputs.logits, torch.cat(rows))


@pytest.mark.parametrize("rows", [7, 6, 5, 4])
def test_last_microbatches_may_be_smaller(rows: int) -> None:
    pair = training.pair()
    batch: dict[str, Any] = {name: value[:rows] for name, value in pair.batch.items()}
    expected = torch.zeros(())
    for x, y in zip(batch["x"].tensor_split(4), batch["y"].tensor_split(4), strict=True):
        loss = reference.loss_of(pair.plain(x, y)) * (len(x) / rows)
        loss.backward()
        expected += loss.detach()
    whole = copy.deepcopy(pair.plain)
    with pair.compiled as compiled:
        loss = compiled.forward_backward(**batch)
    assert torch.equal(loss, expected)
    pair.assert_equal()
    torch.testing.assert_close(loss, whole(**batch).detach())
