"""Attention whose backward is given output and log-sum-exp: kernels, graphs, and training with it."""

from __future__ import annotations

import copy
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import rpcompile
from rpcompile.attention import from_kept, with_log_sum_exp
from rpcompile.attention_kernels import KERNELS, Call, Kernel, find_kernel, log_sum_exp_like
from rpcompile.ir import AttentionOutputs, SegmentChain, Stage, StageKind
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.price_attention import PriceAttention
from tests import families, memory_cases, models, reference, staged
from tests.measured_memory import Measured
from tests.test_head_groups import with_groups
from tests.test_tiling import with_tiles

if TYPE_CHECKING:
    from rpcompile.ir import Capture, StageGraph

F, B, FB = StageKind.F, StageKind.B, StageKind.FB
CPU = replace(models.SLOW_GPU, name="cpu")  # whose kernels the programs here run
ROWS = 37


def heads(count: int, dtype: torch.dtype, rows: int = ROWS, size: int = 16) -> torch.Tensor:
    """As models make them: tokens first in memory."""
    return torch.randn(2, rows, count, size).to(dtype).transpose(1, 2).requires_grad_()


def mask(kind: str, dtype: torch.dtype) -> torch.Tensor | None:
    if kind == "bool":
        found = torch.rand(2, 1, ROWS, ROWS) > 0.3
        found[..., 0] = True
        return found
    return torch.randn(2, 1, ROWS, ROWS).to(dtype) if kind == "float" else None


# --------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "full", "bool", "float"])
def test_output_and_gradients_are_those_of_torch_bit_for_bit(
    dtype: torch.dtype, key_heads: int, kind: str
) -> None:
    torch.manual_seed(0)
    three = heads(4, dtype), heads(key_heads, dtype), heads(key_heads, dtype)
    added, causal, scale = mask(kind, dtype), kind == "causal", 0.3 if kind == "full" else None
    expected = functional.scaled_dot_product_attention(
        *three, added, is_causal=causal, scale=scale, enable_gqa=key_heads < 4
    )
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, three, gradient)
    with torch.no_grad():
        output, kept, log_sum_exp = with_log_sum_exp(*three, added, causal, scale, dtype)
    assert torch.equal(output, expected)
    assert log_sum_exp.shape == (2, 4, ROWS)
    # As they come back from the host: copies.
    again = from_kept(*three, added, causal, scale, kept.clone(), log_sum_exp.clone())
    assert torch.equal(again, expected)
    for mine, other in zip(torch.autograd.grad(again, three, gradient), theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_groups_of_heads_change_no_bit_and_take_the_memory_of_q_k_and_v(
    dtype: torch.dtype, groups: int, kind: str
) -> None:
    torch.manual_seed(0)
    given = [heads(count, dtype) for count in (4, 2, 2)]
    added, causal = mask(kind, dtype), kind == "causal"
    expected = functional.scaled_dot_product_attention(*given, added, is_causal=causal, enable_gqa=True)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, given, gradient)
    with torch.no_grad():
        _, *kept = with_log_sum_exp(*given, added, causal, None, dtype)
    before = [tensor.clone() for tensor in kept]
    own = [tensor * 1 for tensor in given]
    found = from_kept(*own, added, causal, None, *kept, groups, True)
    mine = torch.autograd.grad(found, given, gradient)
    for ours, other, memory in zip(mine, theirs, own, strict=True):
        assert torch.equal(ours, other)
        assert torch.equal(memory, ours)  # it is where the operand was
    assert all(torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True))


def test_operands_stay_where_their_memory_may_not_be_taken() -> None:
    three = heads(4, torch.float32), heads(4, torch.float32), heads(4, torch.float32)
    before = [tensor.detach().clone() for tensor in three]
    with torch.no_grad():
        _, *kept = with_log_sum_exp(*three, None, True, None, torch.float32)
    from_kept(*three, None, True, None, *kept, 2, False).sum().backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(three, before, strict=True))


def test_nothing_is_computed_in_the_forward_of_what_was_kept() -> None:
    three = heads(4, torch.float32), heads(4, torch.float32), heads(4, torch.float32)
    kept = torch.arange(2.0 * ROWS * 4 * 16).view(2, ROWS, 4, 16)
    again = from_kept(*three, None, True, None, kept, torch.zeros(2, 4, ROWS))
    assert torch.equal(again, kept.transpose(1, 2))


def test_only_what_needs_a_gradient_gets_one() -> None:
    query, key, value = heads(2, torch.float32), heads(2, torch.float32), heads(2, torch.float32)
    frozen = key.detach()
    with torch.no_grad():
        _, *kept = with_log_sum_exp(query, frozen, value, None, True, None, torch.float32)
    from_kept(query, frozen, value, None, True, None, *kept).sum().backward()
    assert query.grad is not None
    assert value.grad is not None
    assert frozen.grad is None


def test_it_computes_in_the_dtype_of_autocast() -> None:
    torch.manual_seed(0)
    three = heads(4, torch.float32), heads(2, torch.float32), heads(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.scaled_dot_product_attention(*three, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        _, *kept = with_log_sum_exp(*three, None, True, None, torch.bfloat16)
    again = from_kept(*three, None, True, None, *kept)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again, expected)
    for mine, other in zip(
        torch.autograd.grad(again.sum(), three), torch.autograd.grad(expected.sum(), three), strict=True
    ):
        assert torch.equal(mine, other)


def call(**changes: object) -> Call:
    dtype = changes.pop("dtype", torch.bfloat16)
    assert isinstance(dtype, torch.dtype)
    three = {name: heads(4, dtype) for name in ("query", "key", "value")}
    return replace(Call(**three, attn_mask=None, dropout_p=0.0, dtype=dtype), **changes)


HALF = torch.bfloat16
TABLE: list[tuple[str, Call, str]] = [
    ("cpu", call(), "_scaled_dot_product_flash_attention_for_cpu"),
    ("cpu", call(dtype=torch.float64), "_scaled_dot_product_flash_attention_for_cpu"),
    ("cpu", call(attn_mask=torch.ones(2, 1, ROWS, ROWS)), "_scaled_dot_product_flash_attention_for_cpu"),
    ("cpu", call(attn_mask=torch.ones(2, ROWS, ROWS)), "mask has 3 dimensions"),
    ("cpu", call(dropout_p=0.1), "its dropout of 0.1 would have to be drawn again"),
    ("cpu", call(value=heads(4, HALF, size=8)), "its values are 8 wide and its queries 16"),
    ("cpu", call(query=torch.ones(2, 4, 16)), "its query has 3 dimensions, and fused kernels take 4"),
    ("cpu", call(key=heads(4, HALF, rows=16).transpose(2, 3)), "do not lie side by side in memory"),
    ("cuda", call(), "_scaled_dot_product_flash_attention"),
    ("cuda", call(key=heads(2, HALF), value=heads(2, HALF)), "_scaled_dot_product_flash_attention"),
    ("cuda", call(attn_mask=torch.ones(ROWS, ROWS)), "it has a mask, and CUDA's flash attention takes none"),
    ("cuda", call(dtype=torch.float32), "_scaled_dot_product_efficient_attention"),
    (
        "cuda",
        call(dtype=torch.float32, key=heads(2, torch.float32), value=heads(2, torch.float32)),
        "CUDA's flash attention takes float16 and bfloat16, not float32",
    ),
    (
        "cuda",
        replace(call(), **{n: heads(4, HALF, size=12) for n in ("query", "key", "value")}),
        "_efficient_",
    ),
    ("cuda", replace(call(), **{n: heads(4, HALF, size=6) for n in ("query", "key", "value")}), "are 6 wide"),
]


@pytest.mark.parametrize(("device", "asked", "answer"), TABLE, ids=[f"{t[0]}: {t[2]}" for t in TABLE])
def test_the_table_of_kernels(device: str, asked: Call, answer: str) -> None:
    found = find_kernel(device, asked)
    if answer.startswith("_"):
        assert isinstance(found, Kernel)
        assert answer in found.name
    else:
        assert isinstance(found, str)
        assert answer in found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_of_cuda_take_their_operands(dtype: torch.dtype) -> None:
    """Flash and memory-efficient attention, on tensors without data: shapes and signatures."""
    three = [heads(4, dtype).detach().to("meta").requires_grad_() for _ in range(3)]
    output, *kept = with_log_sum_exp(*three, None, True, None, dtype)
    kernel = find_kernel("cuda", Call(*three, None, 0.0, dtype))
    assert kept[1].shape == log_sum_exp_like(kernel, output).shape
    found = torch.autograd.grad(from_kept(*three, None, True, None, *kept).sum(), three)
    assert [grad.shape for grad in found] == [tensor.shape for tensor in three]


@pytest.mark.parametrize("kernel", KERNELS["cuda"], ids=lambda kernel: kernel.name)
def test_a_backward_of_what_was_kept_is_told_what_autograd_would_tell_it(kernel: Kernel) -> None:
    """Flash attention takes a table of sequences, however empty, for one of several in one."""
    three = [heads(4, torch.bfloat16).detach().to("meta").requires_grad_() for _ in range(3)]
    node = kernel.forward(*three, None, True, None)[0].grad_fn
    assert node is not None
    told = kernel.details(three[0], three[1])
    assert {f"_saved_{name}" for name in told} < set(dir(node))
    for name, mine in told.items():
        theirs = getattr(node, f"_saved_{name}")
        if isinstance(theirs, torch.Tensor):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        else:
            assert mine == theirs, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_of_cuda_equal_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    three = [heads(4, dtype).detach().to("cuda").requires_grad_() for _ in range(3)]
    # Without cuDNN's, which some cards prefer.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        expected = functional.scaled_dot_product_attention(*three, is_causal=True)
    with torch.no_grad():
        output, *kept = with_log_sum_exp(*three, None, True, None, dtype)
    assert torch.equal(output, expected)
    again = from_kept(*three, None, True, None, *kept)
    gradient = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad(again, three, gradient),
        torch.autograd.grad(expected, three, gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_plan_for_other_kernels_says_what_to_do() -> None:
    query = heads(4, torch.float32)
    with pytest.raises(TypeError, match=r"mask has 3 dimensions.*use attention='recompute'"):
        with_log_sum_exp(query, query, query, torch.ones(2, ROWS, ROWS), False, None, torch.float32)


# --------------------------------------------------------------------- graphs


def offloading(captured: Capture, chain: SegmentChain, device: str = "cpu") -> SegmentChain:
    """The chain with every attention output offloaded that can be."""
    costed = EstimateCosts().run(captured)
    bound = BindChain(captured.example_sizes, replace(CPU, name=device)).run(costed)
    tiles = {segment.tiles for segment in chain.segments[:-1]}
    bound = ChooseTiles(costed, max(tiles)).run(bound)
    priced = PriceAttention(costed).run(bound)
    pairs = zip(chain.segments, priced.segments, strict=True)
    segments = tuple(
        replace(free, attention=s.attention, offloads=bool(s.attention and s.attention.nodes))
        for free, s in pairs
    )
    return replace(chain, segments=segments, hardware=bound.hardware)


def both_ways(
    item: families.Family, tiles: int, groups: int
) -> tuple[list[StageGraph], list[AttentionOutputs], list[bool]]:
    """Runs a tiny family with and without offloading, with it in groups of heads.

    Returns the stages that offload, what was offloaded, and what is equal.
    """
    assert item.tiny is not None
    case = models.build(item.tiny)
    with item.context():
        captured = staged.capture(case.model, case.batch)
    chain = with_tiles(staged.free_chain(captured), tiles, tiles)
    count = len(chain.segments)
    stages = staged.partition(
        chain.first_backward, count, count - 1, set(range(0, count, 3)), set(range(1, count, 2))
    )
    assert len({segment.tiles for segment in chain.segments}) == 1
    seen: list[StageGraph] = []
    found: list[list[torch.Tensor | None]] = []
    offloaded = with_groups(offloading(captured, chain), groups, tiles)
    for option in (chain, offloaded):
        model = copy.deepcopy(case.model)
        torch.manual_seed(11)
        loss = staged.forward_backward(
            model, captured, option, stages, case.batch, 4, reference.draw_seed(), look=seen.append
        )
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    equal = [
        (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))  # type: ignore[arg-type]
        for mine, other in zip(*found, strict=True)
    ]
    return seen[len(stages.stages) :], [s.kept for s in offloaded.segments if s.kept], equal


# Tied weights, adapters, mixtures, autocast, masks.
KEPT = [
    ("Qwen3, tied", 1, 1),
    ("Qwen3, tied", 3, 2),
    ("LoRA on Qwen3", 1, 2),
    ("Qwen3-MoE", 3, 1),
    ("bfloat16 autocast", 1, 2),
    ("Padded on the left", 3, 2),
]


@pytest.mark.parametrize(("name", "tiles", "groups"), KEPT)
def test_gradients_are_those_of_recompute_bit_for_bit(name: str, tiles: int, groups: int) -> None:
    graphs, kept, equal = both_ways(families.family(name), tiles, groups)
    assert kept
    assert all(equal)
    for graph in graphs:
        calls = [node for node in graph.graph_module.graph.nodes if node.op == "call_function"]
        targets = [str(node.target) for node in calls]
        computes = any("scaled_dot_product" in target for target in targets)
        # A forward stage hands on two values for each of its attentions, a backward stage takes them.
        assert not computes or graph.stage.kind is FB or "LoRA" in name
        given = {node.args[8:] for node in calls if node.target is from_kept}
        assert given <= ({(2, True)} if groups == 2 else {()})
        names = [value for values in graph.keeps.values() for value in values]
        assert set(names) <= set(graph.outputs if graph.stage.kind is F else graph.values)
        assert all(name.endswith(("_output", "_log_sum_exp")) for name in names)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GPT-2", "its dropout of 0.1 would have to be drawn again"),
        ("GPT-OSS", None),  # sinks: attention is written out, and there is nothing to keep
    ],
)
def test_what_cannot_be_kept_is_recomputed(name: str, reason: str | None) -> None:
    item = families.family(name)
    assert item.tiny is not None
    case = models.build(item.tiny)
    captured = staged.capture(case.model, case.batch)
    segments = offloading(captured, staged.free_chain(captured)).segments
    assert not any(segment.kept for segment in segments)
    refused = {text for segment in segments if segment.attention for text in segment.attention.refused}
    assert refused == ({reason} if reason else set())


class Biased(torch.nn.Module):
    """Two attentions with a mask: the first one's is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.bias = torch.nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).unflatten(-1, (2, 4)).transpose(1, 2)
        heads = functional.scaled_dot_product_attention(heads, heads, heads, self.bias + 0)
        heads = functional.scaled_dot_product_attention(heads, heads, heads, mask)
        return self.second(heads.transpose(1, 2).flatten(2)).square().mean()


def test_a_mask_is_refused_on_cuda_and_a_learned_one_everywhere() -> None:
    model, batch = Biased(), {"x": torch.randn(4, 6, 8), "mask": torch.ones(4, 1, 6, 6) > 0}
    captured = staged.capture(model, batch)
    costed = EstimateCosts().run(captured)
    learned = "its mask has a gradient, which fused kernels do not make"
    for device, kept, reasons in (
        ("cpu", 1, {learned}),
        ("rtx4090", 0, {learned, "it has a mask, and CUDA's flash attention takes none"}),
    ):
        chain = BindChain(captured.example_sizes, replace(CPU, name=device)).run(costed)
        found = [s.attention for s in PriceAttention(costed).run(chain).segments if s.attention]
        assert sum(len(attention.nodes) for attention in found) == kept
        assert {reason for attention in found for reason in attention.refused} == reasons


# --------------------------------------------------------------------- memory


@pytest.mark.parametrize(("tiles", "groups"), [(1, 1), (4, 4)])
def test_predicted_memory_is_what_the_allocator_gives_out(tiles: int, groups: int) -> None:
    case = memory_cases.llama()
    captured = staged.capture(case.model, case.batch, 1)
    found = Measured(case, captured, tiles=tiles, offload=True, head_groups=groups)
    last = len(found.chain.segments) - 1
    kept = [index for index, segment in enumerate(found.chain.segments) if segment.kept]
    assert kept == [1, 3]
    for stage in (Stage(0, B, 1, 1), Stage(0, B, 1, last - 1), Stage(0, F, 1, 1), Stage(0, F, 1, last - 1)):
        given = found.given_bytes(stage)
        measured = found.measured_bytes(stage)
        assert abs((found.predicted_bytes(stage) + given) / (measured + given) - 1) <= 0.001, stage


def test_groups_of_heads_need_less_with_what_was_kept() -> None:
    """Where a layer's attention is a segment, and takes memory in proportion to the sequence."""
    case = models.build(qwen3)
    case.model.to(torch.bfloat16)
    costed = EstimateCosts().run(staged.capture(case.model, case.batch))
    bound = BindChain({"batch": 1, "sequence": 2048}, models.SLOW_GPU).run(costed)
    needs: list[int] = []
    for groups in (1, 2):
        priced = PriceAttention(costed).run(with_groups(bound, groups))
        attention = priced.segments[1].attention
        assert attention is not None
        needs.append(attention.saved_bytes + attention.peak_bytes)
    assert needs[0] > needs[1]


# --------------------------------------------------------------------- training


def compiled(case: models.Case, gpus: int, attention: str, **options: object) -> rpcompile.Compiled:
    return rpcompile.compile(
        case.model,
        gpus,
        example_inputs=case.batch,
        microbatches=4,
        gpu=CPU,
        attention=attention,
        solver_time_s=0.3,
        effort=None,
        **options,  # type: ignore[arg-type]
    )


def qwen3() -> models.Case:
    from transformers import Qwen3ForCausalLM

    config = models.qwen3_config(4)
    config.tie_word_embeddings = False
    return models.Case(Qwen3ForCausalLM(config), models.tokens())


def offloads(program: rpcompile.Compiled) -> set[str]:
    """The buffers that hold attention outputs on the host."""
    return {name for name in program.plan.schedule.buffers if name.startswith("host:kept.")}


# What one GPU that has room for everything computes is computed once, so that there is nothing to offload.
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_training_equals_plain_pytorch_bit_for_bit(gpus: int) -> None:
    case = models.build(qwen3)
    plain = copy.deepcopy(case.model)
    with compiled(case, gpus, "offload") as program:
        assert bool(offloads(program)) == (gpus > 1)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (case.model, plain)]
        for _ in range(3):
            expected = reference.forward_backward(plain, case.batch, 4, random=False)
            assert program.forward_backward(**case.batch) == expected
            program.step(optimizers[0])
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-lora"])
def test_delays_and_accumulation_change_no_bit(family: str) -> None:
    case = models.make(family)
    results: list[list[torch.Tensor | None]] = []
    for attention, seed in (("recompute", None), ("offload", None), ("offload", 1)):
        trained = models.Case(copy.deepcopy(case.model), case.batch)
        choices = random.Random(seed)
        with compiled(trained, 3, attention) as program:
            assert bool(offloads(program)) == (attention == "offload")
            if seed is not None:
                program._training.engine.before_instruction = lambda _, c=choices: time.sleep(
                    c.choice((0, 0, 0, 0.001))
                )
            torch.manual_seed(3)
            losses = [program.forward_backward(**case.batch) for _ in range(2)]
        results.append([*losses, *(parameter.grad for parameter in trained.model.parameters())])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)  # type: ignore[arg-type]


def test_a_saved_plan_offloads_what_it_did(tmp_path: Path) -> None:
    case = models.build(qwen3)
    with compiled(case, 2, "offload", tiles=2) as program:
        kept = offloads(program)
        program.plan.save(tmp_path / "plan.json")
        loss = program.forward_backward(**case.batch)
        gradients = [parameter.grad.clone() for parameter in case.model.parameters()]
        case.model.zero_grad()
    again = rpcompile.compile(
        case.model, example_inputs=case.batch, plan=tmp_path / "plan.json", attention="recompute"
    )
    with again:
        assert offloads(again) == kept
        assert again.forward_backward(**case.batch) == loss
    for parameter, gradient in zip(case.model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_rows_that_attend_to_nothing_are_no_reason_to_stop() -> None:
    """Their log-sum-exp is infinite, which `detect_nan` must not take for an overflow."""
    case = models.build(qwen3)
    with compiled(case, 2, "offload", detect_nan=True) as program:
        stage = next(stage for stage in program.program.stages if stage.keeps and stage.stage.kind is F)
        graph = stage.graph_module.graph
        (both,) = [node for node in graph.nodes if node.target is with_log_sum_exp][:1]
        both.target = infinite
        stage.graph_module.recompile()
        program.forward_backward(**case.batch)


def infinite(*arguments: object) -> tuple[torch.Tensor, ...]:
    output, kept, log_sum_exp = with_log_sum_exp(*arguments)  # type: ignore[arg-type]
    log_sum_exp[0, 0, 0] = torch.inf
    return output, kept, log_sum_exp
