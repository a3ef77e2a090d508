from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given

from benchmarks import make_profiles
from rpcompile import hardware
from rpcompile.activations import activations
from rpcompile.errors import ProfileFileError
from rpcompile.ir import AttentionOutputs, TiedWeight
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.planner import PlanOptions, plan_profile
from rpcompile.profile import Profile, ProfileAttention, schema
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests import chains

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL: dict[str, Any] = {
    "format": "rpcompile.profile",
    "version": 1,
    "hardware": {
        "name": "toy",
        "memory_bytes": 1000,
        "usable_bytes": 900,
        "h2d_bytes_per_s": 10.0,
        "d2h_bytes_per_s": 5.0,
    },
    "tokens_per_microbatch": 64,
    "segments": [
        {
            "name": name,
            "forward_s": 1.5,
            "backward_s": backward_s,
            "weight_bytes": 40,
            "gradient_bytes": gradient_bytes,
            "boundary_bytes": boundary_bytes,
            "saved_bytes": 7,
        }
        for name, backward_s, gradient_bytes, boundary_bytes in (
            ("frozen", 0, 0, 6),
            ("layer", 2.5, 40, 8),
            ("norm", 0, 0, 9),
            ("head", 3.5, 40, 0),
        )
    ],
}


def parse(**changes: object) -> Profile:
    return Profile.parse(json.dumps({**SMALL, **changes}))


def with_attention(index: int, **fields: object) -> list[dict[str, Any]]:
    """The segments, one of them with attention."""
    return [{**s, "attention": fields} if i == index else s for i, s in enumerate(SMALL["segments"])]


def test_a_chain_from_a_profile():
    chain = parse().to_chain()
    assert chain.bindings == {"batch": 1, "sequence": 64}
    assert (chain.hardware.name, chain.hardware.usable_bytes, chain.hardware.latency_s) == ("toy", 900, 0)
    assert [s.needs_backward for s in chain.segments] == [False, True, True, True]
    assert chain.first_backward == 1
    assert [s.boundary_bytes for s in chain.segments] == [6, 8, 9, 0]
    assert [s.boundary_gradient_bytes for s in chain.segments] == [0, 8, 9, 0]
    assert [bool(s.boundary_gradients) for s in chain.segments] == [False, True, True, False]
    layer = chain.segments[1]
    assert (layer.name, layer.forward_s, layer.backward_s) == ("layer", 1.5, 2.5)
    assert (layer.weight_bytes, layer.gradient_bytes, layer.saved_bytes) == (40, 40, 7)
    assert (layer.chunks, layer.source) == (1, "given")


def test_hop_seconds_choose_the_bytes():
    # 6 s from GPU to host at 5 byte/s and back up at 10: 20 bytes, 4 s + 2 s
    chain = parse(hop_s=6).to_chain()
    assert [s.boundary_bytes for s in chain.segments] == [20, 20, 20, 0]
    assert [s.boundary_gradient_bytes for s in chain.segments] == [0, 20, 20, 0]
    with_latency = {**SMALL["hardware"], "latency_s": 1.5}
    assert parse(hop_s=6, hardware=with_latency).to_chain().segments[0].boundary_bytes == 10
    assert parse(hop_s=0).to_chain().segments[0].boundary_bytes == 1


def test_hardware_by_name_and_memory():
    assert parse(hardware="rtx4090").to_chain().hardware == hardware.lookup("rtx4090")
    changed = parse(hardware="rtx4090", gpu_memory_bytes=10**9).to_chain().hardware
    assert changed.usable_bytes == 10**9
    assert changed.sources["usable_bytes"] == "given: by the profile"


def test_chunks_reach_the_chain():
    segments = [{**segment, "chunks": 4} for segment in SMALL["segments"]]
    assert [s.chunks for s in parse(segments=segments).to_chain().segments] == [4, 4, 4, 4]


@given(chains.problems())
def test_any_chain_comes_back(problem: Any):
    chain, stages, gpus, microbatches, mode = problem
    last = replace(chain.segments[-1], boundary_bytes=0, boundary_gradient_bytes=0)
    # A segment without times or gradients tells a profile nothing of where backwards begin.
    tied = tuple(replace(item) for item in chain.tied)
    # Nor does a profile say what is offloaded; the last segment is never recomputed.
    every = (*chain.segments[:-1], replace(last, attention=None))
    segments = (
        replace(s, offloads=False, attention=s.attention if s.needs_backward else None) for s in every
    )
    chain = replace(chain, segments=tuple(segments), bindings={"batch": 2, "sequence": 8}, tied=tied)
    again = Profile.parse(json.dumps(_plain(Profile.from_chain(chain)))).to_chain()
    assert again.bindings == {"batch": 1, "sequence": 16}
    assert again.hardware == chain.hardware
    assert again.tied == chain.tied
    names = {"parameters", "boundary", "boundary_gradients", "inputs"}
    for before, after in zip(chain.segments, again.segments, strict=True):
        fields = set(before.__dataclass_fields__) - names
        assert {f: getattr(after, f) for f in fields} == {f: getattr(before, f) for f in fields}
        assert bool(after.inputs) == bool(before.inputs)
    first = simulate(chains.compiled(chain, stages, gpus, microbatches, mode))
    assert simulate(chains.compiled(again, stages, gpus, microbatches, mode)).makespan_s == first.makespan_s


def _plain(profile: Profile) -> Any:
    return msgspec.to_builtins(profile)


def test_save_and_load(tmp_path: Path):
    path = tmp_path / "new" / "profile.json"
    profile = parse(hop_s=0.25, source="a stopwatch", gpu_memory_bytes=800)
    profile.save(path)
    assert Profile.load(path) == profile
    assert [item.name for item in path.parent.iterdir()] == ["profile.json"]
    assert json.loads(path.read_text("utf-8"))["source"] == "a stopwatch"
    assert "chunks" not in json.loads(path.read_text("utf-8"))["segments"][0]


def test_source_says_where_a_chain_had_its_times():
    chain = chains.chain(2, {0: {"source": "measured"}, 1: {"source": "estimated"}})
    assert Profile.from_chain(chain).source == "estimated, measured"
    assert Profile.from_chain(chain, "mine").source == "mine"
    assert Profile.from_chain(chain).tokens_per_microbatch is None


def _change(path: str, value: object) -> Callable[[Any], None]:
    def change(profile: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            profile = profile[int(key) if key.isdigit() else key]
        if value is MISSING:
            del profile[last]
        else:
            profile[last] = value

    return change


MISSING = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "segments/1/forward_s",
            float("nan"),
            "p.json: $.segments[1].forward_s is not a finite number;",
        ),
        ("hop_s", float("inf"), "p.json: $.hop_s is not a finite number"),
        ("segments/2/saved_bytes", -1, "Expected `int` >= 0 - at `$.segments[2].saved_bytes`; see"),
        ("segments/0/backward_s", -0.5, "Expected `float` >= 0.0 - at `$.segments[0].backward_s`"),
        ("segments/0/name", MISSING, "missing required field `name` - at `$.segments[0]`"),
        ("segments/0/weight_bytes", "4", "Expected `int`, got `str` - at `$.segments[0].weight_bytes`"),
        ("segments/0/weight_bytes", 1.5, "Expected `int`, got `float` - at `$.segments[0].weight_bytes`"),
        ("segments/0/chunks", 0, "Expected `int` >= 1 - at `$.segments[0].chunks`"),
        ("segments/0/weigth_bytes", 4, "unknown field `weigth_bytes` - at `$.segments[0]`"),
        ("segments", [], "Expected `array` of length >= 1 - at `$.segments`"),
        ("hardware/h2d_bytes_per_s", 0, "at `$.hardware.h2d_bytes_per_s`"),
        (
            "hardware",
            "rtx4080",
            "p.json: $.hardware: hardware 'rtx4080' is not in the catalogue;",
        ),
        (
            "gpu_memory_bytes",
            1001,
            "a plan may use 1001 bytes of a GPU that has 1000; lower $.gpu",
        ),
        (
            "segments/3/boundary_bytes",
            5,
            "$.segments[3].boundary_bytes is 5; the last segment",
        ),
        ("version", 2, "p.json: has version 2, this rpcompile reads 1; use a newer rpcompile"),
        ("version", "1", "p.json: $.version is '1'; it must be 1"),
        ("version", True, "p.json: $.version is True; it must be 1"),
        ("version", MISSING, "p.json: $.version is None; it must be 1"),
        (
            "format",
            "rpcompile.plan",
            'is no profile; it must be an object with "format": "rpcompile.profile"',
        ),
        (
            "tied",
            [{"name": "w", "segments": [0, 4], "weight_bytes": 1, "gradient_bytes": 1}],
            "$.tied[0].segments names segment 4 of 4; segments are counted from 0",
        ),
    ],
)
def test_mistakes_name_where_and_what(path: str, value: object, message: str):
    wrong = json.loads(json.dumps(SMALL))
    _change(path, value)(wrong)
    with pytest.raises(ProfileFileError, match=re.escape(message)) as caught:
        Profile.parse(json.dumps(wrong), "p.json")
    assert str(caught.value).startswith("p.json: ")


@pytest.mark.parametrize("text", ["", "{", "[1", "\x00", "[" * 100_000])
def test_text_that_is_no_json(text: str):
    with pytest.raises(ProfileFileError, match=r"^p\.json: is no JSON: "):
        Profile.parse(text, "p.json")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ProfileFileError, match=r"missing\.json: cannot be read: .*No such file"):
        Profile.load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileFileError, match=r"binary\.json: cannot be read: .*utf-8"):
        Profile.load(tmp_path / "binary.json")


def test_a_plan_from_a_profile():
    chain = parse(gpu_memory_bytes=400).to_chain()
    stages = PartitionStages(gpus=2, microbatches=2, time_limit_s=2.0).run(chain)
    schedule = chains.compiled(chain, stages, 2, 2)
    verify_schedule(schedule, chain, stages)
    # two microbatches, and at least the work of one GPU's share: (4 x 1.5 + 2.5 + 3.5) x 2 / 2
    assert simulate(schedule).makespan_s >= 12


def test_tied_weights_come_through():
    tied = [{"name": "w", "segments": [0, 3], "weight_bytes": 5, "gradient_bytes": 6}]
    assert parse(tied=tied).to_chain().tied == (TiedWeight("w", (0, 3), 5, 6),)


def test_the_schema_is_up_to_date():
    stored = resources.files("rpcompile").joinpath("data/profile.schema.json").read_text("utf-8")
    assert json.loads(stored) == schema()


@pytest.mark.parametrize(
    ("name", "hop_s", "work_s"),
    [
        # one microbatch: layers x (forward + backward) + head
        ("Qwen3-1.7B", 1.6e-3, 28 * 23.260e-3 + 65.7725e-3),
        ("Llama3-8B", 3.2e-3, 32 * 59.71029688e-3 + 111.7265e-3),
        ("Qwen3-32B", 4.0e-3, 64 * 131.73535938e-3 + 163.222e-3),
    ],
)
def test_published_profiles(name: str, hop_s: float, work_s: float):
    path = Path(make_profiles.__file__).parent / "profiles" / f"{name.lower()}.json"
    profile = Profile.load(path)
    assert profile == make_profiles.profile(name)
    chain = profile.to_chain()
    assert sum(s.forward_s + s.backward_s for s in chain.segments) == pytest.approx(work_s)
    gpu, size = chain.hardware, chain.segments[0].boundary_bytes
    up_s, down_s = size / gpu.h2d_bytes_per_s, size / gpu.d2h_bytes_per_s
    assert up_s + down_s + 2 * gpu.latency_s == pytest.approx(hop_s, rel=1e-6)
    assert chain.segments[-1].name == "lm_head"


# --------------------------------------------------------------------- attention


def test_attention_outputs_can_be_offloaded_by_a_plan_of_a_profile() -> None:
    segments = with_attention(1, nbytes=2, forward_s=0.5, peak_bytes=3)
    profile = parse(segments=segments)
    attention = profile.to_chain().segments[1].attention
    assert attention == AttentionOutputs((), 2, 0.5, saved_bytes=7, peak_bytes=3, forward_peak_bytes=0)
    options = PlanOptions(2, 4, solver_time_s=0.2, effort=None, attention="offload")
    plan = plan_profile(profile, options)
    assert plan.chain.segments[1].recompute_s == 1.0
    assert "attention='offload' was asked for." in "\n".join(activations(plan))
    again = Profile.from_chain(plan.chain)
    assert again.segments[1].attention == ProfileAttention(2, 0.5, 7, 3, 0)
    assert all(segment.attention is None for segment in (*again.segments[:1], *again.segments[2:]))


@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (
            0,
            {"nbytes": 2, "forward_s": 0.5},
            "$.segments[0].attention is given, but segment 'frozen' is never",
        ),
        (3, {"nbytes": 2, "forward_s": 0.5}, "$.segments[3].attention is given, but segment 'head' is never"),
        (
            1,
            {"nbytes": 2, "forward_s": 1.75},
            "$.segments[1].attention.forward_s is 1.75, more than the 1.5 of its whole segment; give",
        ),
        (1, {"nbytes": 0, "forward_s": 0.5}, "`int` >= 1 - at `$.segments[1].attention.nbytes`"),
        (1, {"nbytes": 2, "forward_s": -0.5}, "`float` >= 0.0 - at `$.segments[1].attention.forward_s`"),
        (1, {"nbytes": 2}, "missing required field `forward_s` - at `$.segments[1].attention`"),
    ],
)
def test_attention_that_cannot_be(index: int, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileFileError, match=re.escape(message)):
        parse(segments=with_attention(index, **fields))
