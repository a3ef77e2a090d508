from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from rpcompile import hardware
from rpcompile.errors import ExecutionError
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.measure_chain import MeasureChain
from rpcompile.runtime import stopwatch
from rpcompile.runtime.stage_runner import StageRunner
from rpcompile.runtime.stopwatch import Stopwatch
from tests import models, staged

if TYPE_CHECKING:
    from rpcompile.ir import Capture, SegmentChain


class Clock:
    """Stands still but for the stage calls: forward 2 s, backward with recompute 7 s, fused 11 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, extra: tuple[float, ...] = ()) -> None:
        self.now, self.extra = 0.0, list(extra)
        self.calls: list[str] = []
        for name, cost_s in (("forward", 2.0), ("backward", 7.0), ("fused", 11.0)):
            monkeypatch.setattr(StageRunner, name, self._timed(name, cost_s, getattr(StageRunner, name)))
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def _timed(self, name: str, cost_s: float, run: Any) -> Any:
        def timed(runner: StageRunner, *args: Any) -> Any:
            result = run(runner, *args)
            self.calls.append(name)
            self.now += cost_s + (self.extra.pop(0) if self.extra else 0.0)
            return result

        return timed


def bound(captured: Capture, **sizes: int) -> SegmentChain:
    bindings = {**captured.example_sizes, **sizes}
    return BindChain(bindings, hardware.lookup("rtx4090")).run(EstimateCosts().run(captured))


def captured(model: nn.Module | None = None) -> Capture:
    case = models.mlp(8, 8, 8, 8, 5)
    return staged.capture(model or case.model, case.batch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_equal_segments_are_timed_once(clock: Clock, tmp_path: Path):
    graph = captured()
    chain = bound(graph)
    measured = MeasureChain(graph, Stopwatch(repeats=3, warmup=2), tmp_path).run(chain)
    # The first layer's input needs no gradient; the next two are alike; the last has the loss.
    assert (
        clock.calls
        == ["forward"] * 5
        + ["backward"] * 5
        + ["forward"] * 5
        + ["backward"] * 5
        + ["forward"] * 5
        + ["fused"] * 5
    )
    assert [(s.forward_s, s.backward_s) for s in measured.segments] == [(2, 5), (2, 5), (2, 5), (2, 9)]
    assert {s.source for s in measured.segments} == {"measured"}
    assert {s.source for s in chain.segments} == {"estimated"}
    kept = [replace(s, forward_s=0, backward_s=0, source="") for s in measured.segments]
    assert kept == [replace(s, forward_s=0, backward_s=0, source="") for s in chain.segments]
    assert (measured.bindings, measured.hardware) == (chain.bindings, chain.hardware)


def test_the_median_behind_the_warm_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # forwards take 102, 3, 2, 52: the median of the last three is 3
    clock = Clock(monkeypatch, extra=(100.0, 1.0, 0.0, 50.0))
    graph = captured()
    measured = MeasureChain(graph, Stopwatch(repeats=3), tmp_path).run(bound(graph))
    assert (measured.segments[0].forward_s, measured.segments[0].backward_s) == (3, 4)
    assert clock.calls.count("fused") == 4


def test_times_are_kept_on_disk(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph = captured()
    first = MeasureChain(graph, Stopwatch()).run(bound(graph))
    files = sorted((tmp_path / "rpcompile" / "measurements").iterdir())
    assert len(files) == 3
    content = json.loads(files[0].read_text("utf-8"))
    assert content["torch"] == torch.__version__
    assert content["device"].startswith("cpu, ")

    calls = len(clock.calls)
    assert MeasureChain(captured(), Stopwatch()).run(bound(graph)) == first
    assert len(clock.calls) == calls

    files[0].write_text('{"forward_s": 1')  # damaged: it is measured again
    assert MeasureChain(graph, Stopwatch()).run(bound(graph)) == first
    assert len(clock.calls) == calls + 2 * 6
    assert json.loads(files[0].read_text("utf-8")) == content


def test_other_sizes_are_other_segments(clock: Clock, tmp_path: Path):
    graph = captured()
    MeasureChain(graph, Stopwatch(), tmp_path).run(bound(graph))
    calls = len(clock.calls)
    MeasureChain(graph, Stopwatch(), tmp_path).run(bound(graph, batch=3))
    assert len(clock.calls) == 2 * calls


def test_frozen_layers_have_no_backward(clock: Clock, tmp_path: Path):
    model = models.mlp(8, 8, 8, 8, 5).model
    layers: Any = model.layers
    layers[0].requires_grad_(False)
    layers[2].weight.requires_grad_(False)
    graph = captured(model)
    measured = MeasureChain(graph, Stopwatch(), tmp_path).run(bound(graph))
    assert [(s.forward_s, s.backward_s) for s in measured.segments] == [(2, 0), (2, 5), (2, 5), (2, 9)]
    assert clock.calls.count("backward") == 2 * 6  # alike but for what they train: each timed


def test_a_backward_is_never_less_than_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Clock(monkeypatch, extra=(10.0,) * 6)
    graph = captured()
    assert MeasureChain(graph, Stopwatch(), tmp_path).run(bound(graph)).segments[0].backward_s == 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_runs(family: str, tmp_path: Path):
    case = models.make(family)
    graph = staged.capture(case.model, case.batch)
    chain = bound(graph)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    measured = MeasureChain(graph, Stopwatch(repeats=1, warmup=0), tmp_path).run(chain)
    for segment in measured.segments:
        assert segment.forward_s > 0
        assert segment.needs_backward or segment.backward_s == 0
    files = len(list(tmp_path.iterdir()))
    expected = {"qwen3-tied": 5, "gpt2-tied-dropout": 6, "qwen3-lora": 6}
    assert files == expected.get(family, files)
    assert files <= len(chain.segments)
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())


def test_a_model_without_weights_on_another_device(tmp_path: Path):
    # Tensors on the meta device do not mix with those of the CPU, where the graph was captured.
    with torch.device("meta"):
        from transformers import Qwen3ForCausalLM

        model = Qwen3ForCausalLM(models.qwen3_config()).train()
    graph = staged.capture(model, models.make("qwen3-tied").batch)
    measured = MeasureChain(graph, Stopwatch("meta"), tmp_path).run(bound(graph))
    assert len(list(tmp_path.iterdir())) == 5
    assert all(segment.source == "measured" for segment in measured.segments)
    assert json.loads(next(tmp_path.iterdir()).read_text("utf-8"))["device"].startswith("meta, ")


def test_a_segment_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory, tried 3 GiB")

    monkeypatch.setattr(StageRunner, "fused", fail)
    graph = captured()
    with pytest.raises(
        ExecutionError,
        match=r"^segment \S+ cannot be measured on cpu, .* threads at \{.batch.: 2\}: out of memory, "
        r"tried 3 GiB; measure smaller sizes, or use estimated seconds$",
    ):
        MeasureChain(graph, Stopwatch(), tmp_path).run(bound(graph))
