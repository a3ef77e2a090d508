"""The published bubbles, partitions and throughput (benchmarks/data), computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bubbles, throughput
from rpcompile.cli import main
from rpcompile.ir import StageKind
from rpcompile.passes.partition_as_given import PartitionAsGiven
from rpcompile.simulate_dispatch import simulate_steady_state

DATA = json.loads((Path(bubbles.__file__).parent / "data" / "published_schedules.json").read_text("utf-8"))
MODELS = list(DATA["models"])
POLICIES = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "round_robin"]
PARTS = ("fill", "switch", "drain", "intra")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", POLICIES)
def test_makespan_bubble_and_its_parts_are_the_published_ones(model: str, policy: str) -> None:
    published = DATA["models"][model]["published"][bubbles.PUBLISHED_NAMES[policy]]
    timeline = bubbles.run(model, policy, semantics="published")
    assert 1e3 * timeline.makespan_s == pytest.approx(published["makespan_ms"], abs=1e-4)
    assert 100 * timeline.bubble == pytest.approx(published["bubble_ratio_pct"], abs=1e-4)
    for part in PARTS:
        assert 1e3 * getattr(timeline.idle, f"{part}_s") == pytest.approx(published[f"{part}_ms"], abs=5e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_command_line_gives_the_published_figures(
    model: str, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = DATA["models"][model]
    profile = Path(bubbles.__file__).parent / "profiles" / f"{model.lower()}.json"
    flags = ["--profile", str(profile), "--policy", policy, "--semantics", "published", "--json"]
    published = given["published"][bubbles.PUBLISHED_NAMES[policy]]
    for more in ([], ["--partition", _counts(given["partitions"][bubbles.PUBLISHED_NAMES[policy]])]):
        assert main(["simulate", *flags, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert 1e3 * found["iteration_s"] == pytest.approx(published["makespan_ms"], abs=1e-4)
        assert 100 * found["bubble"] == pytest.approx(published["bubble_ratio_pct"], abs=1e-4)
        for part in PARTS:
            assert 1e3 * found["idle_s"][part] == pytest.approx(published[f"{part}_ms"], abs=5e-3)


def _counts(partition: Any) -> str:
    """A published partition as `--partition` takes it."""
    parts = [partition["forward"], partition["backward"]] if isinstance(partition, dict) else [partition]
    return "|".join(",".join(map(str, part)) for part in parts)


def test_policies_side_by_side_by_compute_alone(capsys: pytest.CaptureFixture[str]) -> None:
    profile = Path(bubbles.__file__).parent / "profiles" / "qwen3-32b.json"
    flags = ["compare", "--profile", str(profile), "--semantics"]
    assert main([*flags, "strict", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in found] == ["round_robin", *POLICIES[:4]]
    assert 100 * found[0]["bubble"] == pytest.approx(6.9145, abs=1e-4)
    assert main([*flags, "published"]) == 0
    assert "round_robin        23978.83 ms   6.6661 %  1.5596 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "bubble_pct"), [("Qwen3-1.7B", 19.0676), ("Llama3-8B", 14.2839), ("Qwen3-32B", 6.9145)]
)
def test_strict_dependencies_change_one_model_only(model: str, bubble_pct: float) -> None:
    assert 100 * bubbles.run(model, "round_robin").bubble == pytest.approx(bubble_pct, abs=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", POLICIES)
def test_published_partitions_follow_from_the_layer_times(model: str, policy: str) -> None:
    given = DATA["models"][model]["partitions"][bubbles.PUBLISHED_NAMES[policy]]
    stages = bubbles.partition(model, policy).stages
    head = len(bubbles.chain(model).segments) - 1

    def layers(*kinds: StageKind) -> list[int]:
        return [min(s.last, head - 1) - s.first + 1 for s in stages if s.kind in kinds]

    assert PartitionAsGiven(_counts(given)).run(bubbles.chain(model)).stages == stages
    if policy == "round_robin":
        assert layers(StageKind.F) == given["forward"]
        assert layers(StageKind.FB, StageKind.B) == given["backward"]
    else:
        assert layers(StageKind.F) == given
        assert layers(StageKind.B) == given[::-1]


# The chained figures are averages over whole turns of the GPUs. That of Llama3-8B is given as 2.24: its
# iterations take two different times in turn, and an average over an odd number of them is not the limit.
@pytest.mark.parametrize(
    ("model", "chained_pct"), [("Qwen3-1.7B", 5.38), ("Llama3-8B", 2.22), ("Qwen3-32B", 3.72)]
)
def test_asynchronous_bubbles(model: str, chained_pct: float) -> None:
    given = DATA["models"][model]
    timeline = bubbles.run(model, "round_robin", semantics="published")
    idle = timeline.idle
    share = (idle.switch_s + idle.intra_s) / (8 * timeline.makespan_s)
    assert 100 * share == pytest.approx(given["async_published_pct"], abs=5e-3)
    assert given["async_chained_pct"] == pytest.approx(chained_pct, abs=0.021)
    dispatch = bubbles.dispatch(model, "round_robin")
    steady = simulate_steady_state(
        bubbles.chain(model),
        bubbles.partition(model, "round_robin"),
        dispatch,
        hop_s=bubbles.hop_s(model),
        rotate=len(dispatch.jobs) % 8,
    )
    assert 100 * steady.bubble == pytest.approx(chained_pct, abs=5e-3)


def test_measured_throughput_is_predicted_from_the_layer_times() -> None:
    rows = throughput.rows()
    assert len(rows) == 12
    errors = [abs(row["error"]) for row in rows]
    assert sum(errors) / len(errors) < 0.015
    assert max(errors) < 0.05
