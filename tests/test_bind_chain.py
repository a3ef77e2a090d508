from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rpcompile.device_kernels import Kernels
from rpcompile.errors import InvalidArgument
from rpcompile.ir import Hardware, TiedWeight
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.estimate_costs import EstimateCosts
from tests.small_captures import BATCH, capture_of, cut_behind

if TYPE_CHECKING:
    from rpcompile.ir import Capture, CostedGraph, SegmentChain

# 100 FLOP/s and 1000 byte/s: a product of matrices is bound by compute, the rest by memory
TOY = Hardware("toy", 10**6, 10**6, 100.0, 1000.0, 1000.0, 1000.0, 0.0, {})


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()).sum()


def bound(capture: Capture, **sizes: int) -> SegmentChain:
    return BindChain(sizes, TOY, Kernels("cpu")).run(EstimateCosts().run(capture))


def two_layers(model: nn.Module | None = None) -> Capture:
    return capture_of(model or TwoLayers(), {"x": torch.randn(3, 8)}, BATCH, ["relu"])


def test_every_field_of_two_segments():
    chain = bound(two_layers(), batch=4)
    first, last = chain.segments
    assert chain.bindings == {"batch": 4}
    assert chain.hardware is TOY
    assert chain.tied == ()

    assert (first.name, last.name) == ("relu", "last")
    assert (first.nodes, last.nodes) == (("linear", "relu"), ("linear_1", "sum_1"))
    assert (first.parameters, last.parameters) == (("first.weight",), ("second.weight",))
    assert (first.inputs, last.inputs) == (("x",), ())
    assert (first.input_bytes, last.input_bytes) == (4 * 8 * 4, 0)
    assert (first.boundary, last.boundary) == (("relu",), ())
    assert first.boundary_gradients == ("relu",)
    assert (first.boundary_bytes, first.boundary_gradient_bytes) == (4 * 16 * 4, 4 * 16 * 4)
    assert (last.boundary_bytes, last.boundary_gradient_bytes) == (0, 0)
    assert (first.weight_bytes, first.gradient_bytes) == (8 * 16 * 4, 8 * 16 * 4)
    assert (last.weight_bytes, last.gradient_bytes) == (16 * 4 * 4, 16 * 4 * 4)
    assert (first.state_bytes, last.state_bytes) == (0, 0)
    assert first.needs_backward
    assert last.needs_backward
    assert {first.source, last.source} == {"estimated"}

    assert (first.forward_flops, last.forward_flops) == (2 * 4 * 8 * 16, 2 * 4 * 16 * 4)
    assert (first.backward_flops, last.backward_flops) == (1024, 2 * 512)  # x needs no gradient
    # first: 1024 FLOPs; relu reads and writes 256 bytes, backward reads 2 x 256 and writes 256
    assert first.forward_s == pytest.approx(10.24 + 0.512)
    assert first.backward_s == pytest.approx(10.24 + 0.768)
    # second: 512 FLOPs; the sum reads 64 bytes and writes 4, backward the other way round
    assert last.forward_s == pytest.approx(5.12 + 0.068)
    assert last.backward_s == pytest.approx(10.24 + 0.068)

    assert first.saved_bytes == 256  # relu keeps its result; x is the caller's
    assert last.saved_bytes == 0
    assert first.saved_input_bytes == last.saved_input_bytes == 0  # relu's result is held by relu already
    # backward of the first layer: the gradient of its output (256) and of its weight (512); relu's result,
    # which is counted as saved, is gone by then
    assert first.peak_bytes == 768 - 256
    # backward of the second: the gradient of its weight. That of its output is a view of one number, that
    # of its input has a buffer.
    assert last.peak_bytes == 256


def test_the_shares_that_kernels_reach_lengthen_times():
    shares = {"matmul": 0.5, "matmul_backward": 0.25, "memory": 0.1}
    costed = EstimateCosts().run(two_layers())
    first, last = BindChain({"batch": 4}, replace(TOY, efficiency=shares)).run(costed).segments
    assert first.forward_s == pytest.approx(10.24 / 0.5 + 0.512 / 0.1)
    assert first.backward_s == pytest.approx(10.24 / 0.25 + 0.768 / 0.1)
    limited = replace(TOY, efficiency={"matmul_sustained": 0.05})
    # 512 FLOPs at 5 FLOP/s, which leaves the sum time enough
    assert BindChain({"batch": 4}, limited).run(costed).segments[1].forward_s == pytest.approx(102.4)
    assert last.forward_s == pytest.approx(5.12 / 0.5 + 0.068 / 0.1)


def test_forward_peak_counts_what_is_still_needed():
    class Residual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = x.exp()
            b = a.sin().cos()
            return (a + b)[:1].sum()

    chain = bound(capture_of(Residual(), {"x": torch.randn(3, 8)}, BATCH), batch=4)
    # a, sin and cos at once; then a, cos and the sum
    assert chain.segments[0].peak_bytes == 3 * 4 * 8 * 4
    assert not chain.segments[0].needs_backward


def test_forward_peak_holds_the_boundary_to_the_end():
    class Skip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = x.exp()
            b = a.sin()
            return (b.cos() + a).sum()

    chain = bound(capture_of(Skip(), {"x": torch.randn(3, 8)}, BATCH, ["sin", "cos"]), batch=4)
    assert [segment.boundary for segment in chain.segments] == [("exp", "sin"), ("exp", "cos"), ()]
    # exp and sin; cos besides both, which nothing holds; the sum and its total besides exp and cos
    assert [segment.peak_bytes for segment in chain.segments] == [2 * 128, 128 + 256, 132 + 256]
    chain = bound(capture_of(Skip(), {"x": torch.randn(3, 8)}, BATCH, ["cos"]), batch=4)
    assert chain.segments[0].peak_bytes == 3 * 128


def test_frozen_prefix_needs_no_backward():
    model = TwoLayers()
    model.first.requires_grad_(False)
    chain = bound(two_layers(model), batch=4)
    first, last = chain.segments
    assert not first.needs_backward
    assert (first.backward_s, first.gradient_bytes, first.saved_bytes) == (0.0, 0, 0)
    assert first.boundary_gradients == ()
    assert first.boundary_gradient_bytes == 0
    assert last.needs_backward
    assert chain.first_backward == 1


def test_gradient_passes_through_a_frozen_segment():
    model = TwoLayers()
    model.second.requires_grad_(False)
    _, last = bound(two_layers(model), batch=4).segments
    assert last.needs_backward
    assert last.gradient_bytes == 0
    assert last.backward_flops == 512
    assert last.saved_bytes == 0


def test_tensor_kept_by_several_nodes_is_counted_once_a_segment():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.up, self.gate = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.base(x)
            return (self.up(h) + self.gate(h.view(-1, 2, 4).flatten(1))).sum()

    inputs = {"x": torch.randn(3, 8)}
    (whole,) = bound(capture_of(Gated(), inputs, BATCH), batch=4).segments
    assert whole.saved_bytes == 4 * 8 * 4  # h, also where a view of it is kept
    first, last = bound(capture_of(Gated(), inputs, BATCH, ["linear_1"]), batch=4).segments
    assert (first.saved_bytes, last.saved_bytes, last.saved_input_bytes) == (4 * 8 * 4, 0, 0)


def test_tied_weight_is_uploaded_by_each_reader():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle, self.head = (
                nn.Embedding(10, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 10, bias=False),
            )
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(self.embed(x))).sum()

    inputs = {"x": torch.zeros(3, 5, dtype=torch.long)}
    chain = bound(capture_of(Tied(), inputs, BATCH, ["embedding", "linear"]), batch=2)
    assert chain.tied == (TiedWeight("embed.weight", (0, 2), 320, 320),)
    assert [segment.parameters for segment in chain.segments] == [
        ("embed.weight",),
        ("middle.weight", "middle.bias"),
        ("embed.weight",),
    ]
    assert [segment.weight_bytes for segment in chain.segments] == [320, 8 * 8 * 4 + 8 * 4, 320]
    (whole,) = bound(capture_of(Tied(), inputs, BATCH), batch=2).segments
    assert whole.weight_bytes == 320 + 8 * 8 * 4 + 8 * 4


def test_two_placeholders_of_one_tensor_are_one_weight():
    capture = two_layers()
    first, second = capture.parameters
    capture = replace(capture, cuts=(), parameters=(first, replace(second, name=first.name)))
    (whole,) = bound(capture, batch=4).segments
    assert whole.parameters == ("first.weight",)
    assert whole.weight_bytes == whole.gradient_bytes == second.nbytes


class Rotated(nn.Module):
    """Two layers that both use an angle made from a buffer, and a mask made from an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.register_buffer("frequency", torch.randn(8))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        angle = self.frequency.cos()
        mask = ids > 0
        h = self.first(x) * angle
        h = self.second(h) * angle
        return h.masked_fill(mask, 0.0).sum()


def test_rematerialised_nodes_are_charged_to_their_first_user():
    inputs = {"x": torch.randn(3, 8), "ids": torch.zeros(3, 8, dtype=torch.long)}
    sizes = {"x": {0: "batch"}, "ids": {0: "batch"}}
    capture = capture_of(Rotated(), inputs, sizes, ["mul"], rematerialised=["cos", "gt"])
    first, last = bound(capture, batch=4).segments
    assert first.nodes == ("linear", "mul")
    # mul reads 128 + 32 and writes 128; cos reads and writes 32
    assert first.forward_s == pytest.approx(2 * 4 * 8 * 8 / 100 + 0.288 + 0.064)
    # mul as above; gt reads 256 and writes 32; masked_fill reads 128 + 32 and writes 128; the sum reads 128
    assert last.forward_s == pytest.approx(2 * 4 * 8 * 8 / 100 + 0.288 + 0.288 + 0.288 + 0.132)
    # both stages make the angle, so both need the buffer; only the last one needs the ids
    assert (first.weight_bytes, last.weight_bytes) == (8 * 8 * 4 + 32, 8 * 8 * 4 + 32)
    assert (first.inputs, last.inputs) == (("x",), ("ids",))
    assert last.input_bytes == 4 * 8 * 8
    assert first.boundary == ("mul",)
    # what autograd keeps of them is there in both: the angle, and the mask; the second layer keeps what
    # comes in
    assert (first.rematerialised_bytes, last.rematerialised_bytes) == (32, 32 + 32)
    assert (first.saved_bytes, last.saved_bytes, last.saved_input_bytes) == (0, 0, 128)


def test_size_of_an_input_does_not_read_the_input():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x).relu()
            return self.second(h.view(x.shape[0], 2, 4)).sum()

    inputs = {"x": torch.randn(3, 8)}
    (size,) = (name for name in capture_of(Sized(), inputs, BATCH).order if name.startswith("sym_size"))
    _, last = bound(capture_of(Sized(), inputs, BATCH, ["relu"], [size]), batch=4).segments
    assert last.inputs == ()


def test_changed_buffers_are_state():
    model = nn.BatchNorm1d(8)
    changed = {"running_mean": "batch_norm", "running_var": "batch_norm", "num_batches_tracked": "add_"}
    capture = capture_of(
        model, {"input": torch.randn(3, 8)}, {"input": {0: "batch"}}, ["add_"], mutations=changed
    )
    counting, normalising = bound(capture, batch=4).segments
    assert (counting.state_bytes, normalising.state_bytes) == (8, 2 * 8 * 4)
    assert normalising.weight_bytes == 4 * 8 * 4
    assert normalising.gradient_bytes == 2 * 8 * 4


def test_sizes_that_do_not_fit_the_capture():
    costed = EstimateCosts().run(two_layers())
    with pytest.raises(
        InvalidArgument,
        match=r"^batch=65 is outside the captured range 1 to 64; choose a value in the range, or capture ",
    ):
        BindChain({"batch": 65}, TOY).run(costed)
    with pytest.raises(InvalidArgument, match=r"^size 'batch' is missing; give it a value from 1 to 64$"):
        BindChain({}, TOY).run(costed)
    with pytest.raises(
        InvalidArgument,
        match=r"^size 'sequence' is not one that the graph was captured with \(batch\); leave it out$",
    ):
        BindChain({"batch": 4, "sequence": 8}, TOY).run(costed)


def test_graph_of_fixed_size_takes_no_sizes():
    capture = capture_of(TwoLayers(), {"x": torch.randn(4, 8)}, None, ["relu"])
    assert bound(capture).segments[0].forward_s == pytest.approx(10.24 + 0.512)
    with pytest.raises(InvalidArgument, match=r"captured with \(none: every size is fixed\); leave it out$"):
        bound(capture, batch=4)


# ------------------------------------------------------------------------------ a transformer


@functools.cache
def tiny_qwen3() -> tuple[nn.Module, CostedGraph]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, 64, (3, 7))
    named = {0: "batch", 1: "sequence"}
    capture = capture_of(model, {"input_ids": ids, "labels": ids}, {"input_ids": named, "labels": named})
    return model, EstimateCosts().run(capture)


@settings(max_examples=5, deadline=None)
@given(batch=st.integers(1, 4), sequence=st.integers(2, 10))
def test_transformer_costs_what_the_flop_counter_counts(batch: int, sequence: int):
    model, costed = tiny_qwen3()
    (segment,) = BindChain({"batch": batch, "sequence": sequence}, TOY).run(costed).segments
    ids = torch.randint(0, 64, (batch, sequence))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
    assert segment.forward_flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert segment.backward_flops == counter.get_total_flops()


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_cutting_changes_no_total(data: st.DataObject):
    _, costed = tiny_qwen3()
    order = costed.capture.order
    positions = data.draw(st.sets(st.integers(1, len(order) - 1), max_size=6).map(sorted))
    cuts = [cut_behind(costed.capture, order[position - 1]) for position in positions]
    values = {node.name: node.meta.get("val") for node in costed.capture.graph_module.graph.nodes}
    # Never between an operator with several results and those results.
    whole_cuts = [
        cut for cut in cuts if not any(isinstance(values[name], tuple | list) for name in cut.values)
    ]
    capture = replace(costed.capture, cuts=tuple(whole_cuts))
    chain = BindChain({"batch": 2, "sequence": 8}, TOY).run(replace(costed, capture=capture))
    (whole,) = BindChain({"batch": 2, "sequence": 8}, TOY).run(costed).segments
    assert sum((segment.nodes for segment in chain.segments), ()) == order
    for field in ("forward_s", "backward_s", "forward_flops", "backward_flops"):
        assert sum(getattr(segment, field) for segment in chain.segments) == pytest.approx(
            getattr(whole, field)
        )
    # tied or not, a weight is counted for each segment that reads it
    again = sum(weight.weight_bytes * (len(weight.segments) - 1) for weight in chain.tied)
    buffers = {spec.name: spec.nbytes for spec in capture.buffers}
    uploaded = sum(segment.weight_bytes for segment in chain.segments)
    assert 0 <= uploaded - whole.weight_bytes - again <= len(chain.segments) * sum(buffers.values())
    assert all(segment.saved_bytes <= whole.saved_bytes for segment in chain.segments)
    # A boundary is counted by its own size; what a kernel makes by the allocator's, in blocks of 512 bytes.
    rounding = 512 * sum(len(segment.boundary) for segment in chain.segments)
    held = sum(segment.saved_bytes + segment.saved_input_bytes for segment in chain.segments)
    assert held + rounding >= whole.saved_bytes
