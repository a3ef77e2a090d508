"""A capture that copies repeated blocks is the full capture, node by node. What differs is not merged."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rpcompile import repeated_blocks
from rpcompile.errors import CaptureError
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from tests import graph_equality

if TYPE_CHECKING:
    from collections.abc import Callable


class Block(nn.Module):
    """Normalisation, two linear layers and a skip connection."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(self.up(self.norm(x)).relu(), 0.1, self.training)
        return x + self.scale * self.down(hidden)


class Stack(nn.Module):
    """A linear layer, then blocks in a row; the loss is the mean square of the last one's output."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


BATCH = {"x": torch.zeros(4, 8)}


def _stack(layers: int = 6, kind: type[nn.Module] = Block) -> Stack:
    return Stack(*(kind() for _ in range(layers))).train()


def _copied(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the layers that were copied, after comparing with the full export."""
    full, repeated, copied = graph_equality.captures(model, BATCH, monkeypatch)
    graph_equality.assert_equal(full, repeated)
    return [int(path.rpartition(".")[2]) for path in copied]


def test_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(8, 8), nn.Sequential(*(Block() for _ in range(6)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.first(x)).sum()

    assert _copied(Model(), monkeypatch) == [2, 3, 4, 5]


def test_blocks_within_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(Block() for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    model = _stack(4, Group)
    full, repeated, copied = graph_equality.captures(model, BATCH, monkeypatch)
    graph_equality.assert_equal(full, repeated)
    inner = [f"layers.0.body.{i}" for i in (2, 3)] + [f"layers.1.body.{i}" for i in range(4)]
    assert copied == [*inner, "layers.2", "layers.3"]


def _other_scale(block: Any) -> None:
    block.scale = 2.0


def _frozen(block: Any) -> None:
    block.up.weight.requires_grad_(False)


def _evaluating(block: Any) -> None:
    block.eval()


def _forward_hook(block: Any) -> None:
    block.up.register_forward_hook(lambda module, args, output: output * 2)


def _forward_pre_hook(block: Any) -> None:
    block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _patched_forward(block: Any) -> None:
    block.forward = types.MethodType(lambda self, x: x + self.up(x)[:, :8], block)


def _patched_inner_forward(block: Any) -> None:
    block.up.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), block.up)


def _other_shape(block: Any) -> None:
    block.up, block.down = nn.Linear(8, 4), nn.Linear(4, 8, bias=False)


def _other_dtype(block: Any) -> None:
    block.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))


def _other_class(block: Any) -> None:
    block.norm = nn.RMSNorm(8)


def _missing_bias(block: Any) -> None:
    block.up.bias = None


def _parametrized(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.up)


CHANGES = [
    _other_scale,
    _frozen,
    _evaluating,
    _forward_hook,
    _forward_pre_hook,
    _patched_forward,
    _patched_inner_forward,
    _other_shape,
    _other_class,
    _missing_bias,
    _parametrized,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_block_that_differs_is_traced(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _stack()
    change(model.layers[3])
    assert _copied(model, monkeypatch) == [2, 4, 5]


def test_all_blocks_with_hooks_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _stack()
    for block in model.layers:
        _forward_hook(block)
    assert _copied(model, monkeypatch) == []


def test_a_hook_on_all_modules_forbids_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert _copied(_stack(), monkeypatch) == []
    finally:
        handle.remove()


def test_sharing_of_parameters_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    model = _stack(7, Tied)
    for index in (1, 4):
        layer: Any = model.layers[index]
        layer.b.weight = layer.a.weight
    # A weight of another block: inside of each block nothing is shared, so these are alike.
    model.layers[5].a.weight = model.layers[6].a.weight  # type: ignore[union-attr]
    # 0 and 2 are traced and alike; 1 and 4 are another kind, of which there are only two.
    assert _copied(model, monkeypatch) == [3, 5, 6]


def test_statistics_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)).relu_()

    model = _stack(5, Normalised)
    assert _copied(model, monkeypatch) == [2, 3, 4]


def test_a_block_that_stands_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _stack(5)
    model.layers.append(model.layers[0])
    assert _copied(model, monkeypatch) == [2, 3, 4, 5]


def test_a_block_called_twice_is_traced_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in [*self.layers, *self.layers]:
                x = layer(x)
            return x.mean()

    assert _copied(Twice(*(Block() for _ in range(4))), monkeypatch) == [2, 3]


def test_a_block_that_returns_its_argument_or_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(pair[0]) + pair[1], pair[1]

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            pair = (x, x * 2)
            for layer in self.layers:
                pair = layer(pair)
            return (pair[0] * pair[1]).sum()

    assert _copied(Model(*(Pair() for _ in range(6))), monkeypatch) == [2, 3, 4, 5]


def test_arguments_that_are_one_tensor_are_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.linear(a) if a is b else self.linear(a + b)

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x = self.first(x)
            for index, layer in enumerate(self.layers):
                x = layer(x, first if index in (3, 4, 6) else x)
            return x.mean()

    assert _copied(Model(*(Sum() for _ in range(7))), monkeypatch) == [2, 5, 6]


def test_what_the_model_does_between_blocks_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Between(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept, x = [], self.first(x)
            for index, layer in enumerate(self.layers):
                with torch.set_grad_enabled(index > 2):
                    x = layer(x)
                x = x * 2 if x.requires_grad else x
                kept.append(x.view(x.shape[0], 2, -1).sum(1))
                if index == 4:
                    x.mul_(2)
                    x = x + kept[1].repeat(1, 2)
            return torch.cat(kept).mean() + x.mean()

    model = Between(*(Block() for _ in range(9)))
    # 0, 1 and 2 run without gradients; 3 reads what carries none, as 1 and 2 do.
    assert _copied(model, monkeypatch) == [6, 7, 8]


def test_a_block_with_a_state_of_its_own_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Calls:
        count = 0

    class Counts(Block):
        def __init__(self, calls: Calls) -> None:
            super().__init__()
            self.calls = calls

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.count += 1
            return super().forward(x) * (3 if self.calls.count % 5 == 4 else 1)

    calls = Calls()
    assert _copied(Stack(*(Counts(calls) for _ in range(5))), monkeypatch) == []
    assert calls.count == 10


def test_a_block_that_reads_a_tensor_it_is_not_given_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[torch.Tensor] = []

    class Reads(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + held[0]

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held[:] = [x * 2]
            return super().forward(x)

    assert _copied(Model(*(Reads() for _ in range(5))), monkeypatch) == []


@pytest.mark.parametrize("use", ["equality", "index", "format", "nothing"])
def test_any_look_at_the_layer_number_is_noticed(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbered(Block):
        layer_idx: int

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if use == "equality" and self.layer_idx == 4:
                x = x * 3
            if use == "index":
                x = x * [1, 1, 1, 1, 2, 1][self.layer_idx]
            if use == "format" and f"{self.layer_idx}" == "4":
                x = x * 3
            if use == "nothing":
                x, _ = x, self.layer_idx
            return super().forward(x)

    model = _stack(6, Numbered)
    for index, layer in enumerate(model.layers):
        layer.layer_idx = index  # type: ignore[assignment]
    assert _copied(model, monkeypatch) == []
    assert [layer.layer_idx for layer in model.layers] == list(range(6))
    assert all(type(layer.layer_idx) is int for layer in model.layers)


def test_a_layer_number_read_in_a_block_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(Block):
        layer_idx: int

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if self.layer_idx == 4 else 1)

    class Outer(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Inner() for _ in range(3))
            for part in self.parts:
                part.layer_idx = index  # type: ignore[assignment]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    assert _copied(Stack(*(Outer(index) for index in range(6))), monkeypatch) == []


def test_a_layer_number_that_nothing_reads_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _stack()
    for index, layer in enumerate(model.layers):
        layer.layer_idx = index  # type: ignore[assignment]
    assert _copied(model, monkeypatch) == [2, 3, 4, 5]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.sampled_from([None, None, None, *CHANGES]), min_size=4, max_size=7),
    doubled=st.integers(0, 6),
)
def test_random_stacks(changes: list[Any], doubled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _stack(len(changes))
    for change, layer in zip(changes, model.layers, strict=True):
        if change is not None:
            change(layer)
    model.layers.append(model.layers[min(doubled, len(changes) - 1)])
    unchanged = [index for index, change in enumerate(changes) if change is None]
    copied = _copied(model, monkeypatch)
    assert set(unchanged[2:]) <= set(copied)
    forbidden = {_forward_hook, _forward_pre_hook, _patched_forward, _patched_inner_forward}
    assert not any(change in forbidden for index, change in enumerate(changes) if index in copied)


# ------------------------------------------------------------------- the model afterwards


class Failing(Block):
    error: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error("stop")
        return super().forward(x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was(error: type[BaseException] | None) -> None:
    model = _stack(6, Failing)
    for index, layer in enumerate(model.layers):
        layer.layer_idx = index  # type: ignore[assignment]
    model.layers[4].error = error  # type: ignore[assignment]
    before = [(name, module, dict(vars(module))) for name, module in model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    forward = Failing.__dict__["forward"]
    capture = CaptureGraph(ExampleInputs.of(BATCH))
    if error is None:
        capture.run(model)
    else:
        with pytest.raises(CaptureError if error is RuntimeError else error, match="stop"):
            capture.run(model)
    after = [(name, module, dict(vars(module))) for name, module in model.named_modules()]
    assert [(name, id(module)) for name, module, _ in before] == [(name, id(m)) for name, m, _ in after]
    assert all(a[2] == b[2] for a, b in zip(before, after, strict=True))
    assert tensors == [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    assert Failing.__dict__["forward"] is forward
    assert "forward" not in vars(nn.Sequential(Block()))


def test_an_error_while_copying_falls_back_to_the_full_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("cannot copy")

    monkeypatch.setattr(repeated_blocks, "_copy", fails)
    model = _stack()
    capture = CaptureGraph(ExampleInputs.of(BATCH)).run(model)
    full = CaptureGraph(ExampleInputs.of(BATCH), repeat_blocks=False).run(model)
    graph_equality.assert_equal(full, capture)


def test_inherited_forward_is_inherited_again() -> None:
    class Inherits(Block):
        pass

    CaptureGraph(ExampleInputs.of(BATCH)).run(_stack(4, Inherits))
    assert "forward" not in vars(Inherits)
