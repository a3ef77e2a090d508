from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rpcompile import hardware, probe
from rpcompile.errors import InvalidArgument
from rpcompile.profile import Profile
from tests import chains

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="probes the CUDA device")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CPU_MATRIX", 64)
    monkeypatch.setattr(probe, "_CPU_BLOCK_BYTES", 2**16)


def test_rate_is_the_amount_over_the_median(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    steps = iter([50.0, 1.0, 2.0, 4.0, 4.0, 100.0])  # the first warms up; 11 s are reached by four

    def run() -> None:
        nonlocal now
        now += next(steps)

    monkeypatch.setattr(probe.time, "perf_counter", lambda: now)
    assert probe._rate(run, 12, torch.device("cpu"), seconds=11) == 12 / 3
    assert next(steps) == 100.0


def test_rate_runs_three_times_at_least(monkeypatch: pytest.MonkeyPatch):
    times = iter([9.0, 1.0, 5.0, 2.0])
    monkeypatch.setattr(probe, "_timed", lambda run, device: next(times))
    assert probe._rate(lambda: None, 10, torch.device("cpu"), seconds=0) == 5


def test_what_a_product_and_a_copy_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_timed", lambda run, device: run() is None or 2.0)
    cpu = torch.device("cpu")
    assert probe._matmul_flops_per_s(cpu, 8, torch.float32, 0) == 2 * 8**3 / 2
    assert probe._copy_bytes_per_s(cpu, 16, 0) == 2 * 16 / 2


@without_cuda
@pytest.mark.usefixtures("small")
def test_a_machine_without_cuda(tmp_path: Path):
    found = probe.probe(like="h100", seconds=0)
    gpu, base = found.hardware, hardware.lookup("h100")
    assert gpu.name == "cpu"
    assert gpu.flops_per_s > 0
    assert gpu.memory_bytes_per_s == found.host_memory_bytes_per_s > 0
    assert (found.h2d_both_bytes_per_s, found.d2h_both_bytes_per_s) == (None, None)
    assert gpu.efficiency == {}
    assumed = {"memory_bytes", "usable_bytes", "h2d_bytes_per_s", "d2h_bytes_per_s", "latency_s"}
    for name in assumed:
        assert getattr(gpu, name) == getattr(base, name)
        assert gpu.sources[name] == "assumed: h100's, this machine has no CUDA device"
    for name in set(gpu.sources) - assumed:
        assert gpu.sources[name].startswith("measured: ")

    path = tmp_path / "machine.json"
    found.save(path)
    assert hardware.lookup(str(path)) == gpu
    content = json.loads(path.read_text("utf-8"))
    assert content["host_memory_bytes_per_s"] == found.host_memory_bytes_per_s
    profile = Profile.from_chain(replace(chains.chain(1, {0: {"boundary_bytes": 0}}), hardware=gpu))
    assert profile.to_chain().hardware == gpu


@pytest.mark.gpu
def test_a_cuda_device(tmp_path: Path):
    found = probe.probe(seconds=0.05)
    assert found.hardware.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert found.h2d_both_bytes_per_s is not None
    assert found.hardware.sources["h2d_bytes_per_s"].startswith("measured: pinned memory to ")
    found.save(tmp_path / "machine.json")
    assert hardware.lookup(str(tmp_path / "machine.json")) == found.hardware


def test_unknown_entry():
    with pytest.raises(InvalidArgument, match=r"^hardware 'h1000' is not in the catalogue; did you mean"):
        probe.probe(like="h1000")


GOOD = {
    "name": "box",
    "memory_bytes": 10,
    "usable_bytes": 9,
    "h2d_bytes_per_s": 3,
    "d2h_bytes_per_s": 4,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: Input data was truncated; probe the machine"),
        ({"format": "x", "version": 1, "hardware": GOOD}, "has format 'x' version 1; this rpcompile reads"),
        (
            {"format": "rpcompile.hardware", "version": 2, "hardware": GOOD},
            "'rpcompile.hardware' version 2;",
        ),
        (
            {"format": "rpcompile.hardware", "version": 1, "hardware": {**GOOD, "h2d_bytes_per_s": 0}},
            "Expected `float` > 0.0 - at `$.hardware.h2d_bytes_per_s`",
        ),
        ('{"format": "rpcompile.hardware", "version": 1, "hardware": NaN}', "JSON is malformed"),
    ],
)
def test_damaged_files(tmp_path: Path, content: object, message: str):
    path = tmp_path / "machine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidArgument, match=re.escape(message)) as caught:
        hardware.lookup(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(InvalidArgument, match=r"^hardware file nowhere\.json cannot be read: .*No such file"):
        hardware.lookup("nowhere.json")
