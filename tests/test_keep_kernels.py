"""Forward stages round as plain PyTorch does, which computes with autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional

from rpcompile.ir import StageKind
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.training_kernels import as_in_training
from tests import staged
from tests.models import Case

if TYPE_CHECKING:
    from rpcompile.ir import Partition

_ATEN = torch.ops.aten


class Encoder(nn.Module):
    """Attention over `(batch, sequence, features)`, which torch's module transposes before its products."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)).square().mean()


class Recurrent(nn.Module):
    """A GRU whose batch comes first, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.gru = nn.GRU(16, 16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.gru(self.a(x))[0]).square().mean()


class LearnedBias(nn.Module):
    """Attention under a mask that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.a(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value, self.bias)
        return self.c(self.b(out.transpose(1, 2).flatten(2))).square().mean()


def case(kind: type[nn.Module]) -> Case:
    torch.manual_seed(0)
    model = kind().train()
    return Case(model, {"x": torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(2))})


@pytest.mark.parametrize("kind", [Encoder, Recurrent, LearnedBias])
def test_stages_round_as_plain_pytorch_does(kind: type[nn.Module]) -> None:
    captured = staged.check_parity(case(kind), partitions=6)
    assert captured.cuts


def _rewritten(kind: type[nn.Module], partition: Partition | None = None) -> list[object]:
    """The operators that the forward stages run as in training, for one stage each segment."""
    found = case(kind)
    captured = staged.capture(found.model, found.batch)
    chain = staged.free_chain(captured)
    count = len(chain.segments)
    every = set(range(count))
    stages = partition or staged.partition(0, count, count - 1, every, every)
    graphs = ExtractStages(captured, chain).run(stages)
    assert not any(
        node.target is as_in_training
        for graph in graphs
        if graph.stage.kind is not StageKind.F
        for node in graph.graph_module.graph.nodes
    )
    nodes = [node for graph in graphs for node in graph.graph_module.graph.nodes]
    return [node.args[0] for node in nodes if node.target is as_in_training]


def test_only_operators_whose_kernel_depends_on_a_gradient_are_rewritten() -> None:
    # Of each layer's four products, the projection to query, key and value reads transposed memory.
    assert _rewritten(Encoder) == [_ATEN.linear.default] * 2
    assert _rewritten(Recurrent) == [_ATEN.gru.input]
    assert _rewritten(LearnedBias) == [_ATEN.scaled_dot_product_attention.default]


def test_evaluation_runs_the_kernels_of_evaluation() -> None:
    found = case(Encoder)
    chain = staged.free_chain(staged.capture(found.model, found.batch))
    everything = staged.partition(0, len(chain.segments), len(chain.segments) - 1, set(), set())
    forward = type(everything)(everything.stages[:1], 0, 0.0, 0.0, "GIVEN", 0.0, "by hand")
    assert _rewritten(Encoder, forward) == []


def test_results_are_detached_and_arguments_left_alone() -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with torch.no_grad():
        seen = as_in_training(lambda a, b, c: (a @ b.T, b.requires_grad, c), (1,), None, x, w, c=[None])
    assert not seen[0].requires_grad
    assert seen[1:] == (True, [None])
    assert not w.requires_grad
