"""`benchmarks/gpu_bench.py` on the CPU, so that it works when somebody has a GPU: all steps, all failures."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_bench, gpu_loops

ROOT = Path(__file__).parents[1]


class Here:
    """A loop in this process instead of one of its own; what goes over the pipe is JSON all the same."""

    broken: tuple[str, str] = ("", "")
    ended: list[str]

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = gpu_loops.Settings(**json.loads(json.dumps(settings)))
        self._server = gpu_loops.Server(self._settings)

    def answer(self, deadline: float) -> dict[str, Any]:
        return self.do("start", deadline)

    def do(self, command: str, deadline: float) -> dict[str, Any]:
        if self.broken == (self._settings.loop, command):
            raise gpu_bench.LoopFailed("injected")
        found = json.loads(json.dumps(self._server.answer(command)))
        if "error" in found:
            raise gpu_bench.LoopFailed(found["error"])
        return found["found"]

    def end(self) -> None:
        self.ended.append(self._settings.loop)


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "stand_ins"))
    monkeypatch.setattr(gpu_bench, "Loop", Here)
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.1" if name == "roundpipe" else real(name)
    )
    monkeypatch.setattr(Here, "ended", [], raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith("roundpipe")]:
        del sys.modules[name]


def bench(tmp_path: Path, runs: int = 1) -> dict[str, Any]:
    output = tmp_path / "bench.json"
    gpu_bench.main(["--dry-run", "--runs", str(runs), "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["dry_run"] is True
    assert {"date", "machine", "versions", "options"} < found.keys()
    return found["results"][0]


@pytest.mark.usefixtures("_stand_ins")
def test_every_loop_trains_the_same_model_and_everything_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, runs=2)
    assert found["failures"] == {}
    assert found["turns"].keys() == gpu_loops.LOOPS.keys() == found["tokens_per_s"].keys()
    losses = {turn["loss"] for turns in found["turns"].values() for turn in turns}
    assert max(losses) - min(losses) < 0.02  # bfloat16
    assert all(len(turns) == 2 for turns in found["turns"].values())
    assert found["facts"]["rpcompile"]["host_waits"] == 0
    prediction = found["prediction"]
    assert prediction["predicted_s"] > 0
    assert prediction["recorded_s"] > 0
    assert prediction["predicted_peak_bytes"][0] > 0
    assert 0 <= prediction["hidden_transfer_share"] <= 1
    trace = json.loads((tmp_path / prediction["trace"]).read_text())
    assert len(trace["traceEvents"]) > 20
    assert sorted(Here.ended) == sorted(gpu_loops.LOOPS)
    text = capsys.readouterr().out
    assert "(predicted " in text
    assert "resident, recompute" in text


@pytest.mark.usefixtures("_stand_ins")
def test_a_loop_starts_when_the_one_before_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rpcompile measures its device as it starts; another process would be in the way."""
    order: list[tuple[str, str]] = []

    class Noting(Here):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            order.append(("made", self._settings.loop))

        def do(self, command: str, deadline: float) -> dict[str, Any]:
            order.append((command, self._settings.loop))
            raise gpu_bench.LoopFailed("enough")

    monkeypatch.setattr(gpu_bench, "Loop", Noting)
    bench(tmp_path)
    loops = [*gpu_bench.OFFLOADING, *gpu_bench.ALONE]
    assert order == [(what, loop) for loop in loops for what in ("made", "start")]


def test_logical_gpus_that_share_a_device_share_its_peak() -> None:
    loop = gpu_loops.RpcompileLoop.__new__(gpu_loops.RpcompileLoop)
    loop._devices = ["cuda:0", "cuda:1", "cuda:0"]
    assert loop._by_device([1, 10, 100]) == [101, 10]


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("command", ["start", "turn"])
@pytest.mark.parametrize("loop", gpu_loops.LOOPS)
def test_a_loop_that_fails_is_noted_and_the_others_go_on(
    loop: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        """Answers every command at once: what fails is injected in front of it."""

        def __init__(self, settings: gpu_loops.Settings) -> None:
            pass

        def facts(self) -> dict[str, Any]:
            return {}

        def run(self) -> float:
            return 1.0

        def predict(self) -> dict[str, Any]:
            return {
                "predicted_s": 1.0,
                "recorded_s": 1.0,
                "predicted_peak_bytes": [1],
                "measured_peak_bytes": [1],
                "hidden_transfer_share": 1.0,
                "trace": "",
            }

        def waits(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(Here, "broken", (loop, command))
    monkeypatch.setattr(gpu_loops, "LOOPS", dict.fromkeys(gpu_loops.LOOPS, Plain))
    found = bench(tmp_path)
    assert found["failures"] == {loop: "injected"}
    assert found["turns"].keys() == gpu_loops.LOOPS.keys() - {loop}
    assert (found["prediction"] is None) == (loop == "rpcompile")


def settings(loop: str) -> dict[str, Any]:
    options = gpu_bench.parse(["--dry-run"])
    return gpu_bench.Model("tiny", options, 0.0)._settings(loop)


def test_a_process_answers_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pipe: a loop that runs, a command it does not know, one that cannot be imported, and none."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    deadline = time.monotonic() + 120
    loops = [gpu_bench.Loop(settings(name)) for name in ("resident", "roundpipe")]
    assert loops[0].answer(deadline)["torch"] == torch.__version__
    assert loops[0].do("turn", deadline)["seconds"] > 0
    with pytest.raises(gpu_bench.LoopFailed, match=r"AttributeError: .* has no attribute 'jump'"):
        loops[0].do("jump", deadline)
    with pytest.raises(gpu_bench.LoopFailed, match="ModuleNotFoundError: No module named 'roundpipe'"):
        loops[1].answer(deadline)
    with pytest.raises(gpu_bench.LoopFailed, match=r"not done when its time was up"):
        loops[1].answer(time.monotonic())
    with pytest.raises(gpu_bench.LoopFailed, match=r"its process (has ended|ended with -9)"):
        loops[1].do("turn", deadline)
    loops[0].end()


def test_the_cap_leaves_room_beside_the_plan() -> None:
    h200 = gpu_loops.lookup("h200")
    found = gpu_loops.capped(h200, gpu_bench.CAP_BYTES)
    assert found.memory_bytes == 24 * 2**30
    assert found.usable_bytes == 24 * 2**30 - gpu_loops.RESERVE_BYTES
    assert gpu_loops.capped(h200, 2**50) == h200


def test_what_is_asked_of_cuda_exists_and_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name must be one of `torch.cuda`; figures are made up."""
    gib, fractions = 2**30, []
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "get_device_name": lambda device: "a GPU",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=96 * gib),
        "set_per_process_memory_fraction": lambda fraction, device: fractions.append((fraction, device)),
        "mem_get_info": lambda device=None: (60 * gib, 96 * gib),  # others have some
        "memory_reserved": lambda device: 2 * gib,
        "max_memory_allocated": lambda device: 3,
        "max_memory_reserved": lambda device: 4,
        "memory_stats": lambda device: {"num_alloc_retries": 2},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    asked = gpu_loops.Settings(**{**settings("resident"), "device": "cuda"})
    gpu_loops.cap_memory(asked)
    assert fractions == [(0.25, 0)]
    assert torch.cuda.mem_get_info() == (22 * gib, 24 * gib)
    assert gpu_loops.machine(asked)["gpu"] == "a GPU"
    found = gpu_loops.turn(SimpleNamespace(run=lambda: 1.5), asked)
    assert found.pop("seconds") >= 0
    assert found == {"loss": 1.5, "peak_bytes": [3], "peak_reserved_bytes": [4], "allocation_retries": 0}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([]) == 1
    assert "gpu_bench needs a CUDA device" in capsys.readouterr().err
