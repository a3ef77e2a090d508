"""What a capture tells its user: sizes that are fixed, masks that hide nothing; and what it costs to fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile import repeated_blocks
from rpcompile.errors import BatchError, CaptureError
from rpcompile.runtime import batches
from tests import family_tiny, graph_equality, models, staged


class EveryToken(nn.Module):
    """Runs a layer once for each token, so that the graph is that of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(ids.shape[0], 4)
        for index in range(ids.shape[1]):
            state = self.layer(state + self.table(ids[:, index])).tanh()
        return state.square().mean()


def test_a_sequence_that_is_looped_over_is_fixed_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.zeros(8, 5, dtype=torch.long)
    with (
        caplog.at_level(logging.WARNING, logger="rpcompile"),
        rpcompile.compile(EveryToken(), 1, microbatches=4, example_inputs={"ids": ids}) as compiled,
    ):
        notice = (
            "the sequence of EveryToken is fixed at 5, as in the example: its forward depends on the number "
            "(a loop over it, or a shape that fits only some sizes). Batches of another sequence need a "
            "capture of their own"
        )
        assert compiled.program.capture.notices == (notice,)
        assert [record.getMessage() for record in caplog.records] == [notice]
        message = (
            r"^input 'ids' has shape \(8, 6\), compiled for \('batch', 5\); sizes that are numbers are "
            r"fixed: pad to them, or compile with example_inputs of the size you pass$"
        )
        with pytest.raises(BatchError, match=message):
            compiled.forward_backward(ids=torch.zeros(8, 6, dtype=torch.long))


def test_a_batch_that_has_to_be_even_is_fixed() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return (y[0::2] * y[1::2]).sum()

    captured = staged.capture(Pairs(), {"x": torch.zeros(16, 4)})
    assert captured.symbols == {}
    assert captured.notices[0].startswith("the batch of Pairs is fixed at 4, as in the example: ")


@pytest.mark.parametrize("hidden", [0, 2])
def test_a_mask_that_hides_nothing_stays_and_is_said_to_cost(hidden: int) -> None:
    case = models.make("qwen3-tied")
    mask = torch.ones_like(case.batch["input_ids"])
    mask[0, : 2 * hidden] = 0
    captured = staged.capture(case.model, {**case.batch, "attention_mask": mask})
    nodes = [n for n in captured.graph_module.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert all(node.args[3] is not None for node in nodes)
    said = [notice for notice in captured.notices if notice.startswith("attention_mask is all ones")]
    assert len(said) == (not hidden)


def test_a_mask_of_ones_gives_what_no_mask_gives_to_rounding() -> None:
    case = models.make("qwen3-tied")
    mask = torch.ones_like(case.batch["input_ids"])
    with_mask = case.model(**case.batch, attention_mask=mask).loss
    torch.testing.assert_close(with_mask, case.model(**case.batch).loss)


# ------------------------------------------------------------------- failures


class Branching(nn.Module):
    """Layers, one of which branches on data."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(5))
        self.at = at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.at and x.sum() > 0:
                x = -x
        return x.sum()


@pytest.mark.parametrize(("at", "exports"), [(0, 1), (4, 2)])
def test_a_failure_is_exported_again_only_where_copies_may_be_why(
    at: int, exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("export")
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    with pytest.raises(CaptureError, match=r"if index == self\.at and x\.sum"):
        staged.capture(Branching(at), {"x": torch.zeros(8, 4)})
    assert len(calls) == exports


def test_a_torch_without_the_internals_traces_every_block(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = family_tiny.causal("Qwen3", num_hidden_layers=4)
    batch = {name: value[:4] for name, value in case.batch.items()}
    monkeypatch.setattr(repeated_blocks, "_PRIVATE", (*repeated_blocks._PRIVATE, "_in_no_version"))
    full, repeated, copied = graph_equality.captures(case.model.train(), batch, monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert copied == []
    assert f"torch {torch.__version__} has no proxy_tensor._in_no_version" in caplog.text


def test_positions_in_three_dimensions_are_split_along_their_second() -> None:
    case = family_tiny.embedded(models.build(family_tiny.qwen_vl))
    captured = staged.capture(case.model, case.batch)
    parts = batches.split_batch(captured, case.batch, 4)
    assert [tuple(part["position_ids"].shape) for part in parts] == [(3, 2, models.SEQUENCE)] * 4
    assert torch.equal(torch.cat([part["position_ids"] for part in parts], 1), case.batch["position_ids"])
