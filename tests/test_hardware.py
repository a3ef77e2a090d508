from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from rpcompile import hardware
from rpcompile.errors import InvalidArgument


def test_rtx4090_in_bytes_and_seconds():
    gpu = hardware.lookup("rtx4090")
    assert gpu.name == "rtx4090"
    assert gpu.memory_bytes == 25_769_803_776  # 24 GiB, not 24e9
    assert gpu.usable_bytes == 25_769_803_776 - 1_610_612_736
    assert gpu.flops_per_s == pytest.approx(165.2e12)
    assert gpu.memory_bytes_per_s == pytest.approx(1008e9)
    assert gpu.h2d_bytes_per_s == pytest.approx(25e9)
    assert gpu.d2h_bytes_per_s == pytest.approx(26.5e9)
    assert gpu.latency_s == pytest.approx(1e-5)
    assert gpu.sources["flops_per_s"] == "quoted: sustained 158-167 fp16 measured"
    assert gpu.sources["h2d_bytes_per_s"].startswith("measured: 23.9-26.4 up")
    assert gpu.sources["usable_bytes"].startswith("assumed: 1.5 GiB")


def test_case_does_not_matter():
    assert hardware.lookup("RTX4090") == hardware.lookup("rtx4090")


@pytest.mark.parametrize("name", hardware.names())
def test_every_field_of_every_entry_has_a_source(name: str):
    gpu = hardware.lookup(name)
    figures = set(gpu.__dataclass_fields__) - {"name", "sources"}
    assert set(gpu.sources) == figures
    for source in gpu.sources.values():
        kind, _, reason = source.partition(": ")
        assert kind in {"measured", "calibrated", "quoted", "assumed"}
        assert reason
    assert 0 < gpu.usable_bytes < gpu.memory_bytes


def test_a_status_alone_gets_a_reason():
    assert (
        hardware.lookup("rtx3090").sources["h2d_bytes_per_s"]
        == "assumed: no source opened; probe the machine"
    )
    assert hardware.lookup("rtx3090").sources["flops_per_s"] == "quoted: public specification listing"
    assert (
        hardware.lookup("h100").sources["d2h_bytes_per_s"].startswith("assumed: 35-53 measured by SM copies")
    )


def test_float32_keeps_the_16_bit_figure_and_says_so():
    gpu = hardware.lookup("rtx4090", dtype="float32")
    assert gpu.flops_per_s == hardware.lookup("rtx4090", dtype="float16").flops_per_s
    assert gpu.sources["flops_per_s"].endswith("16-bit tensor-core figure, an optimistic bound for float32")


def test_unknown_name_suggests_near_ones():
    with pytest.raises(
        InvalidArgument, match=r"^hardware 'rtx4080' is not in the catalogue; did you mean rtx4090 or "
    ):
        hardware.lookup("rtx4080")
    with pytest.raises(
        InvalidArgument, match=r"^hardware 'mi300x' is not in the catalogue; choose one of rtx3090, "
    ):
        hardware.lookup("mi300x")


def test_unknown_dtype():
    with pytest.raises(
        InvalidArgument, match=r"^dtype 'int8' has no throughput; choose one of bfloat16, float16, float32$"
    ):
        hardware.lookup("rtx4090", dtype="int8")


def test_detect_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.detect() is None


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA RTX A6000", "a6000"),
    ],
)
def test_detect_by_device_name(monkeypatch: pytest.MonkeyPatch, device: str, name: str | None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: device)
    assert hardware.detect() == name


def test_catalogue_keeps_its_notes():
    catalogue = json.loads(resources.files("rpcompile").joinpath("data/hardware.json").read_text("utf-8"))
    assert any("status: measured" in note for note in catalogue["notes"])
    assert tuple(catalogue["gpus"]) == hardware.names()
