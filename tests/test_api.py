"""`rpcompile.compile`: arguments, plans, failures; the message of every error."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.errors import (
    BatchError,
    CaptureError,
    ExecutionError,
    InvalidArgument,
    MissingExampleInputs,
    NotBuiltYet,
    PartitionError,
    PlanFileError,
    PlanMismatch,
    StageTooLarge,
    UnsupportedModel,
)
from tests import models, reference
from tests.test_capture import Branching

QUICK = {"gpus": 2, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}


def compiled_mlp(**options: object) -> tuple[rpcompile.Compiled, models.Case]:
    case = models.make("mlp")
    return rpcompile.compile(case.model, example_inputs=case.batch, **{**QUICK, **options}), case  # type: ignore[arg-type]


def test_hugging_face_inputs_are_inferred() -> None:
    case = models.make("qwen3-tied")
    case.model.config.max_position_embeddings = 16  # type: ignore[union-attr]
    compiled = rpcompile.compile(case.model, **QUICK)
    assert [spec.name for spec in compiled.program.capture.inputs] == ["input_ids", "labels"]
    assert compiled.plan.chain.bindings == {"batch": 1, "sequence": 16}
    assert compiled.forward_backward(**case.batch) > 0


def test_positional_example_inputs() -> None:
    case = models.make("mlp")
    example = tuple(case.batch.values())
    compiled = rpcompile.compile(case.model, example_inputs=example, **QUICK)
    assert compiled.forward_backward(*example) > 0
    with pytest.raises(BatchError, match=r"missing \['0', '1'\], not captured \['x', 'y'\]"):
        compiled.forward_backward(**case.batch)


def test_default_microbatches_divide_the_batch() -> None:
    case = models.make("mlp")
    compiled = rpcompile.compile(case.model, 3, example_inputs=case.batch, solver_time_s=0.5)
    assert compiled.plan.microbatches == 4


def test_missing_example_says_how_to_give_one() -> None:
    with pytest.raises(
        MissingExampleInputs, match=r"inputs of Mlp cannot be inferred.*example_inputs=\(x, y\)"
    ):
        rpcompile.compile(models.make("mlp").model, 2)


@pytest.mark.parametrize("gpus", [0, -1])
def test_no_gpus(gpus: int) -> None:
    with pytest.raises(InvalidArgument, match=f"gpus={gpus} must be at least 1"):
        compiled_mlp(gpus=gpus)


def test_more_gpus_than_segments_names_both() -> None:
    with pytest.raises(PartitionError, match=r"9.*4"):
        compiled_mlp(gpus=9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "fast"}, InvalidArgument, "mode='fast'; it must be 'sync' or 'async'"),
        (
            {"compute_dtype": torch.float64},
            InvalidArgument,
            "compute_dtype=torch.float64; it must be torch.bf",
        ),
        ({"devices": ["cpu"]}, InvalidArgument, "1 entries for 2 GPUs"),
        (
            {"devices": ["cuda:0"] * 2},
            InvalidArgument,
            r"'cuda:0', but torch .* 0 CUDA devices.*'cpu', 'cpu'",
        ),
        ({"devices": ["cuda:0", "cpu"]}, InvalidArgument, r"mixes 'cpu' with CUDA devices; use one kind"),
        ({"devices": ["mps", "mps"]}, NotBuiltYet, "'mps' devices cannot run programs; use 'cpu' or"),
        ({"pin": "on"}, InvalidArgument, "pin='on'; it must be 'auto' or 'off'"),
        ({"timeout_s": 0}, InvalidArgument, "timeout_s=0; it must be above 0"),
        ({"microbatches": 0}, InvalidArgument, "microbatches=0 must be at least 1"),
        ({"microbatches": 3}, BatchError, "batch of 8 does not divide into 3.*microbatches=2"),
        ({"gpu": "rtx409"}, InvalidArgument, "rtx4090"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled_mlp(**options)


def test_model_that_cannot_be_exported_names_the_line() -> None:
    with pytest.raises(CaptureError, match=r"if h.sum\(\) > 0:"):
        rpcompile.compile(Branching(), 1, example_inputs=torch.zeros(4, 4))


def test_nothing_to_train() -> None:
    case = models.make("mlp")
    case.model.requires_grad_(False)
    with pytest.raises(PartitionError, match="nothing to train; set requires_grad"):
        rpcompile.compile(case.model, example_inputs=case.batch, **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"x": b["x"]}, r"missing \['y'\]"),
        (lambda b: {**b, "mask": b["y"]}, r"not captured \['mask'\].*example_inputs"),
        (lambda b: {**b, "y": 3}, "input 'y' must be a tensor, not int"),
        (lambda b: {**b, "y": b["y"].to("meta")}, "input 'y' is on meta; pass it on the host"),
        (lambda b: {**b, "y": b["y"].int()}, "input 'y' is int32, compiled for int64"),
        (lambda b: {**b, "x": b["x"][:, :3]}, r"input 'x' has shape \(8, 3\), compiled for \('batch', 16\)"),
        (lambda b: {k: v[:3] for k, v in b.items()}, r"batch of 3 .* into 4 microbatches.*microbatches=3"),
        (lambda b: {**b, "y": b["y"][:4]}, "has batch 1, other inputs have 2"),
        (lambda b: {k: v[:0] for k, v in b.items()}, "batch of 0"),
    ],
)
def test_bad_batches(change: object, message: str) -> None:
    compiled, case = compiled_mlp()
    with pytest.raises(BatchError, match=message):
        compiled.forward_backward(**change(case.batch))  # type: ignore[operator]
    assert compiled.forward_backward(**case.batch) > 0


def test_sequence_beyond_the_captured_range() -> None:
    case = models.make("bert-padded")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **QUICK)
    long = {name: value.repeat(1, 6) for name, value in case.batch.items()}
    with pytest.raises(BatchError, match=r"sequence is 72 .* captured for 1 to 64"):
        compiled.forward_backward(**long)


def test_meta_model_plans_but_does_not_run() -> None:
    case = models.make("mlp")
    model = copy.deepcopy(case.model).to("meta")
    compiled = rpcompile.compile(model, example_inputs=case.batch, **QUICK)
    assert compiled.plan.prediction.iteration_s > 0
    with pytest.raises(UnsupportedModel, match="on the meta device"):
        compiled.forward_backward(**case.batch)


def test_optimizer_of_another_model() -> None:
    compiled, _ = compiled_mlp()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(InvalidArgument, match=r"SGD holds no parameter of Mlp.*compiled.parameters\(\)"):
        compiled.step(other)


# ------------------------------------------------------------------- plans


def test_saved_plan_is_reused_without_solving_and_gives_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, case = compiled_mlp()
    path = tmp_path / "plan.json"
    compiled.plan.save(path)
    expected = compiled.forward_backward(**case.batch)
    gradients = [parameter.grad.clone() for parameter in case.model.parameters()]
    monkeypatch.setattr("rpcompile.scheduling.PartitionStages.run", lambda *_: pytest.fail("solved again"))
    again = models.make("mlp")
    reused = rpcompile.compile(again.model, example_inputs=again.batch, plan=path)
    assert reused.plan == compiled.plan
    assert str(reused.program) == str(compiled.program)
    assert reused.forward_backward(**again.batch) == expected
    for mine, theirs in zip(again.model.parameters(), gradients, strict=True):
        assert torch.equal(mine.grad, theirs)


def test_plan_for_another_model(tmp_path: Path) -> None:
    compiled, _ = compiled_mlp()
    path = tmp_path / "plan.json"
    compiled.plan.save(path)
    other = models.mlp(16, 8, 8, 8, 5)
    with pytest.raises(PlanMismatch, match=r"made for another model: Mlp .* compile without plan="):
        rpcompile.compile(other.model, example_inputs=other.batch, plan=path)


def test_plan_for_another_number_of_gpus_or_microbatches() -> None:
    compiled, case = compiled_mlp()
    with pytest.raises(PlanMismatch, match="the plan is for 2 GPUs, not 3"):
        rpcompile.compile(case.model, 3, example_inputs=case.batch, plan=compiled.plan)
    with pytest.raises(PlanMismatch, match="the plan is for 4 microbatches, not 2"):
        rpcompile.compile(case.model, example_inputs=case.batch, microbatches=2, plan=compiled.plan)


def test_corrupted_plan_file(tmp_path: Path) -> None:
    compiled, case = compiled_mlp()
    path = tmp_path / "plan.json"
    compiled.plan.save(path)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(PlanFileError, match=r"plan\.json"):
        rpcompile.compile(case.model, example_inputs=case.batch, plan=path)


def test_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    compiled, _ = compiled_mlp()
    (tmp_path / "file").touch()
    with pytest.raises(
        PlanFileError, match=r"file/plan\.json: cannot write the plan: (Not a directory|File exists)"
    ):
        compiled.plan.save(tmp_path / "file" / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------- failures


@pytest.mark.parametrize("operation", ["P@", "F0", "FB1", "B2", "G@", "H0", "V1", "X", "record", "wait"])
def test_failing_instruction_is_named_and_nothing_is_lost(operation: str) -> None:
    compiled, case = compiled_mlp()
    expected = compiled.forward_backward(**case.batch)
    before = copy.deepcopy(case.model.state_dict())
    gradients = [parameter.grad.clone() for parameter in case.model.parameters()]
    failed: list[str] = []

    def fail_once(instruction: str) -> None:
        if operation in instruction and not failed:
            failed.append(instruction)
            raise MemoryError("injected")

    compiled._training.engine.before_instruction = fail_once
    with pytest.raises(ExecutionError, match="MemoryError: injected") as caught:
        compiled.forward_backward(**case.batch)
    assert failed[0] in str(caught.value)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    for parameter, gradient in zip(case.model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    compiled._training.engine.before_instruction = None
    case.model.zero_grad()
    assert compiled.forward_backward(**case.batch) == expected
    for parameter, gradient in zip(case.model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_failure_names_stage_microbatch_gpu_and_modules() -> None:
    compiled, case = compiled_mlp()
    case.batch["y"][7] = 99  # no such class: the loss of the last microbatch raises
    with pytest.raises(
        ExecutionError, match=r"FB3 \(fused of stage \d+, microbatch 3\) failed on GPU \d in .*layers"
    ):
        compiled.forward_backward(**case.batch)


def test_close_ends_the_threads() -> None:
    def running() -> int:
        return sum(thread.name.startswith("rpcompile") for thread in threading.enumerate())

    gc.collect()
    before = running()
    compiled, case = compiled_mlp()
    compiled.forward_backward(**case.batch)
    assert running() > before
    compiled.close()
    for thread in threading.enumerate():
        if thread.name.startswith("rpcompile") and running() > before:
            thread.join(timeout=2)
    assert running() <= before


def test_program_prints_as_python_per_gpu() -> None:
    compiled, _ = compiled_mlp()
    text = str(compiled.program)
    assert text.startswith("def gpu0(gpu):")
    assert "\ndef gpu1(gpu):" in text
    assert "gpu.forward('0F0', stage = 0, microbatch = 0, reads = (" in text
    compile(text, "program", "exec")


def test_tight_memory_gives_a_plan_that_fits_or_names_the_segment() -> None:
    case = models.make("qwen3-lora")
    roomy = rpcompile.compile(case.model, example_inputs=case.batch, **QUICK).plan
    peak = max(roomy.prediction.gpu_peak_bytes)
    tight = replace(models.SLOW_GPU, usable_bytes=int(0.75 * peak))
    plan = rpcompile.compile(case.model, example_inputs=case.batch, **{**QUICK, "gpu": tight}).plan
    assert max(plan.prediction.gpu_peak_bytes) <= tight.usable_bytes == plan.partition.memory_limit_bytes
    assert plan.partition.stages != roomy.partition.stages
    none = replace(models.SLOW_GPU, usable_bytes=10_000)
    with pytest.raises(
        StageTooLarge, match=r"needs .* for one microbatch of batch=2, sequence=12 but slow has"
    ):
        rpcompile.compile(case.model, example_inputs=case.batch, **{**QUICK, "gpu": none})


def test_stages_run_under_the_autocast_of_compile_time_and_no_other() -> None:
    case = models.make("mlp")
    plain = copy.deepcopy(case.model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        compiled = rpcompile.compile(case.model, example_inputs=case.batch, **QUICK)
        expected = reference.forward_backward(plain, case.batch, 4, random=False)
    assert compiled.forward_backward(**case.batch) == expected
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    without, case = compiled_mlp()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InvalidArgument, match=r"autocast to torch.bfloat16, but compiled under none"),
    ):
        without.forward_backward(**case.batch)
