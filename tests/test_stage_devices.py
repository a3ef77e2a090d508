"""What is different on a GPU and shows without one: where a stage's tensors lie, and who runs its backward.

Tensors without data stand for a GPU's: operators refuse to mix them with the CPU's, too.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.ir import Partition, Stage, StageKind
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.runtime import batches
from rpcompile.runtime.stage_runner import Microbatch, StageRunner, Tensors
from tests import models, staged

META = torch.device("meta")


def moved(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to(META) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["qwen3-lora", "bert-padded"])
def test_stages_run_where_they_are_told_to(family: str) -> None:
    case = models.make(family)
    captured = staged.capture(case.model, case.batch, 1)
    chain = staged.free_chain(captured)
    last = len(chain.segments) - 1
    (part,) = batches.split_batch(captured, batches.named_batch(captured, (), case.batch), 1)
    facts, inputs = Microbatch(1, batches.microbatch_sizes(captured, part), 1.0), moved(part)
    held = {**dict(case.model.named_parameters()), **dict(case.model.named_buffers()), **captured.constants}
    stages = [Stage(index, StageKind.F, index, index) for index in range(last + 1)]
    stages.append(Stage(last + 1, StageKind.FB, last, last))
    stages += [Stage(2 * last + 1 - index, StageKind.B, index, index) for index in range(last)]
    values: Tensors = {}
    for graph in ExtractStages(captured, chain).run(Partition(tuple(stages), 0, 0.0, 0.0, "GIVEN", 0.0, "")):
        runner = StageRunner(graph, captured.outputs[0], META)
        weights = [moved({name: held[name] for name in (*graph.parameters, *graph.buffers)})]
        given = {name: values[name] for name in graph.values}
        if graph.stage.kind is StageKind.F:
            values |= runner.forward(weights, inputs, given, facts)
            continue
        if graph.stage.kind is StageKind.FB:
            runner.fused(weights, inputs, given, facts)
        else:
            gradients = {name: torch.empty_like(values[name]) for name in graph.gradients_in}
            runner.backward(runner.recompute(weights, inputs, given, facts), gradients)
        assert {tensor.device for tensor in runner.weight_gradients(weights)[0].values()} <= {META}
    assert {value.device for value in values.values()} == {META}


@pytest.mark.parametrize("attention", ["recompute", "offload"])
def test_a_backward_reads_nothing_that_its_caller_s_thread_has(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd back-propagates what is on a GPU on a thread of its own."""
    backward = torch.autograd.backward

    def elsewhere(*args: Any, **kwargs: Any) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                backward(*args, **kwargs)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        for failure in failures:
            raise failure

    found: list[list[torch.Tensor]] = []
    for run in (backward, elsewhere):
        monkeypatch.setattr(torch.autograd, "backward", run)
        case = models.make("qwen3-tied")
        with rpcompile.compile(
            case.model,
            2,
            example_inputs=case.batch,
            microbatches=2,
            gpu=replace(models.SLOW_GPU, name="cpu"),  # whose attention kernels run here
            solver_time_s=0.5,
            effort=None,
            tiles=3,
            head_groups=2,
            attention=attention,
        ) as compiled:
            kept = [name for name in compiled.plan.schedule.buffers if name.startswith("host:kept.")]
            assert bool(kept) == (attention == "offload")
            torch.manual_seed(3)
            loss = compiled.forward_backward(**case.batch)
        found.append([loss, *(p.grad for p in case.model.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
