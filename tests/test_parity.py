"""The whole line against plain PyTorch: loss, gradients, weights after five AdamW steps."""

from __future__ import annotations

import copy
import random
import time

import pytest
import torch

import rpcompile
from tests import models, reference

STEPS, MICROBATCHES, GPUS = 5, 4, 3
COMPILE = {
    "gpus": GPUS,
    "microbatches": MICROBATCHES,
    "solver_time_s": 1.0,
    "gpu": models.SLOW_GPU,
    "effort": None,
}
# Family -> the two names of its tied tensor.
TIED = {
    "qwen3-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2-tied-dropout": ("transformer.wte.weight", "lm_head.weight"),
    "bert-padded": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}


def batches(case: models.Case) -> list[dict[str, torch.Tensor]]:
    """Five batches of the case's shapes; tokens are permuted, so that steps differ."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(models.BATCH, generator=generator) for _ in range(STEPS)]
    return [{name: value[order] for name, value in case.batch.items()} for order in rows]


def optimizer_for(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)  # type: ignore[arg-type]


def train_plain(
    model: torch.nn.Module, data: list[dict[str, torch.Tensor]], dropout: bool
) -> list[torch.Tensor]:
    optimizer = optimizer_for([p for p in model.parameters() if p.requires_grad])
    losses = []
    for batch in data:
        losses.append(reference.forward_backward(model, batch, MICROBATCHES, dropout))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_compiled(compiled: rpcompile.Compiled, data: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    optimizer = optimizer_for(compiled.parameters())
    losses = []
    for batch in data:
        losses.append(compiled.forward_backward(**batch))
        compiled.step(optimizer)
        optimizer.zero_grad()
    return losses


def assert_same_state(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("family", [name for name in models.FAMILIES if name not in TIED])
def test_five_steps_equal_plain_pytorch_bit_for_bit(family: str) -> None:
    case = models.make(family)
    plain = copy.deepcopy(case.model)
    data = batches(case)
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        dropout = bool(compiled.program.capture.random)
        torch.manual_seed(3)
        expected = train_plain(plain, data, dropout)
        torch.manual_seed(3)
        losses = train_compiled(compiled, data)
    assert losses == expected
    assert len(set(losses)) == STEPS
    assert_same_state(case.model, plain)


def untied_twin(family: str, tied_model: torch.nn.Module) -> torch.nn.Module:
    """The same model with a tensor of its own where the head shares the embedding's."""
    twin = copy.deepcopy(tied_model)
    head = twin.get_submodule(TIED[family][1].removesuffix(".weight"))
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return twin


@pytest.mark.parametrize("family", TIED)
def test_five_steps_with_tied_weights_equal_plain_pytorch_with_the_uses_summed_last(family: str) -> None:
    """Bit for bit against plain PyTorch that adds the two uses' gradients as rpcompile does.

    Plain PyTorch adds them microbatch by microbatch: (h0 + e0) + (h1 + e1). The two uses lie in different
    stages here, so each sums its own: (h0 + h1) + (e0 + e1). That is another rounding of the same sum;
    the untied twin computes it in this order without rpcompile.
    """
    case = models.make(family)
    plain = untied_twin(family, case.model)
    embedding, head = TIED[family]
    data = batches(case)
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        stages = compiled.plan.partition.stages
        assert not any(
            stage.first == 0 and stage.last == len(compiled.plan.chain.segments) - 1 for stage in stages
        )
        torch.manual_seed(3)
        parameters = dict(plain.named_parameters())
        optimizer = optimizer_for([p for name, p in parameters.items() if name != head])
        expected = []
        for batch in data:
            expected.append(
                reference.forward_backward(plain, batch, MICROBATCHES, bool(compiled.program.capture.random))
            )
            parameters[embedding].grad = parameters[head].grad + parameters[embedding].grad
            optimizer.step()
            parameters[head].data.copy_(parameters[embedding].data)
            plain.zero_grad()
        torch.manual_seed(3)
        losses = train_compiled(compiled, data)
    assert losses == expected
    assert_same_state(case.model, plain)


@pytest.mark.parametrize("family", TIED)
def test_tied_gradient_is_counted_once_and_close_to_plain(family: str) -> None:
    case = models.make(family)
    plain = copy.deepcopy(case.model)
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        torch.manual_seed(3)
        expected = reference.forward_backward(
            plain, case.batch, MICROBATCHES, bool(compiled.program.capture.random)
        )
        torch.manual_seed(3)
        assert compiled.forward_backward(**case.batch) == expected
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        # Order of summation, as above: a few float32 ulps of the largest gradient.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_random_delays_before_every_instruction_change_no_bit(family: str) -> None:
    case = models.make(family)
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        start = copy.deepcopy(case.model.state_dict())
        results = []
        for seed in [None, *range(8)]:
            case.model.load_state_dict(start)
            choices = random.Random(seed)
            compiled._training.engine.before_instruction = (
                None if seed is None else lambda _, c=choices: time.sleep(c.choice((0, 0, 0, 0.002)))
            )
            torch.manual_seed(3)
            losses = train_compiled(compiled, batches(case)[:2])
            results.append((losses, copy.deepcopy(case.model.state_dict())))
    for losses, state in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(value, results[0][1][name]) for name, value in state.items())


def test_gradients_accumulate_over_calls() -> None:
    case = models.make("mlp")
    plain = copy.deepcopy(case.model)
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        for _ in range(2):
            compiled.forward_backward(**case.batch)
            reference.forward_backward(plain, case.batch, MICROBATCHES, False)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        # (g0 + ... + g3) + (g0 + ... + g3) here, one running sum there.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def test_other_batch_and_sequence_sizes_run_without_a_new_capture() -> None:
    case = models.make("qwen3-lora")
    plain = copy.deepcopy(case.model)
    batch = {name: torch.cat([value, value], 1)[:4, :17] for name, value in case.batch.items()}
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        torch.manual_seed(3)
        expected = reference.forward_backward(plain, batch, MICROBATCHES, True)
        torch.manual_seed(3)
        assert compiled.forward_backward(**batch) == expected
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_token_counts_make_uneven_microbatches_exact() -> None:
    case = models.make("qwen3-tied")
    labels = case.batch["labels"].clone()
    labels[:3, 4:] = -100
    count = (labels[:, 1:] != -100).sum()
    batch = {**case.batch, "labels": labels}
    plain = copy.deepcopy(case.model)
    whole = plain(**batch).loss
    whole.backward()
    with rpcompile.compile(
        case.model, example_inputs={**batch, "num_items_in_batch": count}, **COMPILE
    ) as compiled:
        loss = compiled.forward_backward(**batch, num_items_in_batch=count)
    # The whole batch at once sums tokens in another order than microbatches do.
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2-tied-dropout", "unet-batchnorm"])
def test_evaluation_equals_eval_mode_and_changes_nothing(family: str) -> None:
    case = models.make(family)
    before = copy.deepcopy(case.model.state_dict())
    with rpcompile.compile(case.model, example_inputs=case.batch, **COMPILE) as compiled:
        output = compiled(**case.batch)
    assert case.model.training
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    case.model.eval()
    parts = [
        case.model(**{name: value.chunk(MICROBATCHES)[i] for name, value in case.batch.items()})
        for i in range(MICROBATCHES)
    ]
    losses = torch.stack([reference.loss_of(part).detach() for part in parts])
    assert torch.equal(reference.loss_of(output), losses.mean())
    if family == "gpt2-tied-dropout":
        assert type(output) is type(parts[0])
        assert torch.equal(output.logits, torch.cat([part.logits for part in parts]))
