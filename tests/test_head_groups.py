"""Attention backward group by group: the same bits, in less memory, over q, k and v where that is safe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from rpcompile.head_groups import attention_by_groups
from rpcompile.ir import SegmentChain, Stage, StageGraph, StageKind
from rpcompile.passes.group_heads import _divisor
from tests import families, memory_cases, models, staged
from tests.measured_memory import Measured


def with_groups(chain: SegmentChain, groups: int, tiles: int = 1) -> SegmentChain:
    segments = tuple(replace(segment, head_groups=groups, tiles=tiles) for segment in chain.segments)
    return replace(chain, segments=segments)


def calls_of(stage: StageGraph) -> list[tuple[int, bool]]:
    """(groups, whether over q, k and v) of each divided attention of a stage."""
    nodes = stage.graph_module.graph.nodes
    return [(n.args[7], n.args[8]) for n in nodes if n.target is attention_by_groups]  # type: ignore[misc]


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_torch_bit_for_bit(groups: int, mask_heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 40, heads, 16, dtype=dtype) for heads in (8, 4, 4)]
    mask = torch.randn(2, mask_heads, 40, 40, dtype=dtype) if mask_heads else None
    theirs, mine = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    expected = functional.scaled_dot_product_attention(
        *((tensor * 1).transpose(1, 2) for tensor in theirs), mask, 0.0, mask is None, enable_gqa=True
    )
    own = [(tensor * 1).transpose(1, 2) for tensor in mine]
    found = attention_by_groups(*own, mask, mask is None, None, True, groups, True)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    found.backward(gradient)
    assert torch.equal(found, expected)
    for ours, other, memory in zip(mine, theirs, own, strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, other.grad)
        assert torch.equal(memory.detach().transpose(1, 2), ours.grad)  # it is where the operand was


def test_operands_stay_where_their_memory_may_not_be_taken() -> None:
    given = [torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3)]
    before = [tensor.detach().clone() for tensor in given]
    attention_by_groups(*given, None, True, None, False, 2, False).sum().backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


def test_expanded_operands_are_not_written_over() -> None:
    """One head of keys for all: its gradient is a sum, which has no room in one head's memory."""
    torch.manual_seed(0)
    query, value = (torch.randn(1, 4, 8, 4, requires_grad=True) for _ in range(2))
    key = torch.randn(1, 1, 8, 4, requires_grad=True)
    grads = []
    for attention in (
        lambda *three: functional.scaled_dot_product_attention(*three, is_causal=True),
        lambda *three: attention_by_groups(*three, None, True, None, False, 2, True),
    ):
        out = attention(query * 1, (key * 1).expand(1, 4, 8, 4), value * 1)
        grads.append(torch.autograd.grad(out.square().sum(), [query, key, value]))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads[1], grads[0], strict=True))


def kernel_on_a_gpu(dtype: torch.dtype) -> str:
    """Name of the backward of attention by groups, on tensors without data, which stand for a GPU's."""
    shapes = (1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)
    three = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    found = attention_by_groups(*three, None, True, None, True, 2, False)
    assert found.grad_fn is not None
    return found.grad_fn.edge.node.name()  # type: ignore[attr-defined,no-any-return]


def test_a_gpu_runs_flash_attention_where_it_can_whatever_torch_prefers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash = "ScaledDotProductFlashAttentionBackward0"
    assert kernel_on_a_gpu(torch.bfloat16) == flash
    assert kernel_on_a_gpu(torch.float32) != flash
    # A kernel that is called by name would not be given the dtype of autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert kernel_on_a_gpu(torch.bfloat16) != flash


def test_a_kernel_that_is_not_known_runs_as_in_torch() -> None:
    torch.manual_seed(0)
    mine, theirs = ([torch.randn(1, 2, 8, 4) for _ in range(3)] for _ in range(2))
    theirs = [tensor.clone().requires_grad_() for tensor in mine]
    mine = [tensor.requires_grad_() for tensor in mine]

    def products(query, key, value, *_, **__):  # type: ignore[no-untyped-def]
        return (query @ key.mT).softmax(-1) @ value

    attention_by_groups(*mine, None, False, None, False, 2, True, attention=products).sum().backward()
    products(*theirs).sum().backward()
    for ours, other in zip(mine, theirs, strict=True):
        assert torch.equal(ours.grad, other.grad)  # type: ignore[arg-type]


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("name", "tiles", "expected"),
    [
        ("Qwen3, tied", 3, {(2, True)}),
        ("Qwen3-MoE", 1, {(2, True)}),
        ("Padded on the left", 3, {(2, True)}),
        ("bfloat16 autocast", 1, {(2, True)}),  # the kernel works on copies, and runs whole
        ("LoRA on experts", 3, {(2, True)}),
        ("GPT-2", 1, set()),  # dropout inside of the attention
        ("GPT-OSS", 3, set()),  # sinks: the attention is written out
        ("T5", 1, set()),  # the mask is learned
    ],
)
def test_groups_change_no_bit_of_a_model(name: str, tiles: int, expected: set[tuple[int, bool]]) -> None:
    item = families.family(name)
    assert item.tiny is not None
    case = models.build(item.tiny)
    with item.context():
        captured = staged.capture(case.model, case.batch)
    free = staged.free_chain(captured)
    count, found = len(free.segments), []
    stages = staged.partition(free.first_backward, count, count - 2, set(), set(range(1, count, 3)))
    for groups in (1, 2):
        model, seen = copy.deepcopy(case.model), list[StageGraph]()
        args = (with_groups(free, groups, tiles), stages, case.batch, 4, 7)
        staged.forward_backward(model, captured, *args, look=seen.append)
        calls = {call for stage in seen for call in calls_of(stage)}
        assert calls == (expected if groups == 2 else set())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(found[1][key], found[0][key]) for key in found[0])


class Reader(nn.Module):
    """Attention whose operands somebody else reads, too."""

    def __init__(self, other: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.other = other

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = self.other(q, k, v)
        return functional.cross_entropy(out.transpose(1, 2).flatten(2).flatten(0, 1), labels.flatten())


def test_groups_have_equally_many_heads() -> None:
    graph = torch.fx.Graph()
    six = graph.placeholder("six")
    six.meta["val"] = torch.empty(1, 6, 8, 4, device="meta")
    attention = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (six, six, six))
    found = [_divisor(attention, groups, frozenset()) for groups in (1, 2, 3, 4, 5, 6, 9)]
    assert found == [1, 2, 3, 3, 3, 6, 6]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("other", "over"),
    [
        (sdpa, True),
        (lambda q, k, v: sdpa(q * 2, k, v + 1), True),
        (lambda q, k, v: sdpa(q, k, v) * q, False),  # its backward reads q
        (lambda q, k, v: sdpa(q, k, v) + k.square(), False),
        (lambda q, k, v: sdpa(q, k, k), False),  # one tensor, two gradients
        (lambda q, k, v: sdpa(q.tanh(), k, v), False),  # the backward of tanh reads its result
        (lambda q, k, v: sdpa(q.tanh_(), k, v), False),  # also in place
        (lambda q, k, v: sdpa(sdpa(q, k, v), k, v), False),  # two attentions read k and v
        (lambda q, k, v: sdpa(*torch.cat([q, k, v]).chunk(3)), False),  # parts of one tensor
    ],
)
def test_memory_is_taken_only_where_nobody_reads_it(other: Callable[..., torch.Tensor], over: bool) -> None:
    torch.manual_seed(0)
    model = Reader(other)
    batch = {"input_ids": torch.randint(13, (4, 12)), "labels": torch.randint(8, (4, 12))}
    plain = copy.deepcopy(model)
    captured = replace(staged.capture(model, batch, microbatches=2), cuts=())
    chain = with_groups(staged.free_chain(captured), 2)
    whole = staged.partition(chain.first_backward, len(chain.segments), 0, set(), set())
    calls: list[tuple[int, bool]] = []
    staged.forward_backward(
        model, captured, chain, whole, batch, 2, 0, look=lambda stage: calls.extend(calls_of(stage))
    )
    for part in range(2):
        (plain(**{name: value.chunk(2)[part] for name, value in batch.items()}) / 2).backward()
    assert calls
    assert any(call[1] for call in calls) == over
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


# ------------------------------------------------------------------ the memory


def test_groups_take_the_memory_that_is_predicted() -> None:
    case = memory_cases.FAMILIES["Llama"]()
    captured = staged.capture(case.model, case.batch, 1)
    whole, found = Measured(case, captured), Measured(case, captured, head_groups=4)
    stage = Stage(0, StageKind.B, 1, 1)
    given = found.given_bytes(stage)
    measured = found.measured_bytes(stage)
    assert abs((found.predicted_bytes(stage) + given) / (measured + given) - 1) <= 0.01
    assert measured < whole.measured_bytes(stage)
