"""`simulate` and `compare`: what a plan, or any policy on a profile, would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from rpcompile.cli import options
from rpcompile.errors import InvalidArgument, PartitionError

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain
    from rpcompile.policies import PolicyResult
    from rpcompile.shared_links import SharedLinks

OptionalPlan = Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="A plan file; or use --profile.")]
GpuCount = Annotated[
    int | None, typer.Option("--gpus", min=1, max=64, help="Number of GPUs (the plan's, or 8).")
]
Semantics = Annotated[
    str,
    typer.Option(
        "--semantics",
        help="full (copies, memory and shared links), or compute and hops alone, as published bubbles are: "
        "strict, or published, in which round robin recomputes before inputs are there.",
    ),
]
_COLUMNS = f"{'policy':<24} {'iteration':>10} {'bubble':>8} {'GPU peak':>10} {'uploads':>10}"
_PARTS = ("fill", "switch", "drain", "intra")
_COMPUTE_COLUMNS = f"{'policy':<17} {'iteration':>12} {'bubble':>10}" + "".join(f"{p:>10}" for p in _PARTS)


class _Setting(NamedTuple):
    """What policies are simulated on: arguments of `policies.simulate_policy` behind the policy."""

    chain: SegmentChain
    gpus: int
    microbatches: int
    mode: str = "sync"
    links: SharedLinks | None = None
    update_s_per_byte: float = 0.0


def simulate(
    plan: OptionalPlan = None,
    profile: options.ProfileFile = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="round_robin, gpipe, 1f1b, interleaved_1f1b or looped_bfs (default: the plan as it is).",
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option("--partition", help='Stages, e.g. "7,7,7,7|0,3,3,3": forward | fused, backward.'),
    ] = None,
    gpus: GpuCount = None,
    microbatches: options.SimulatedMicrobatches = None,
    semantics: Semantics = "full",
    as_json: options.Json = False,
) -> None:
    """Simulate a plan, or a policy with its usual or given stages."""
    from rpcompile import policies

    _check_semantics(semantics)
    if plan is not None and profile is None and policy is None and partition is None:
        from rpcompile.cli.reading import load

        if gpus is not None or microbatches is not None:
            raise InvalidArgument(
                "--gpus and --microbatches need --policy or --profile; the plan has its own"
            )
        if semantics != "full":
            raise InvalidArgument(
                f"--semantics {semantics} needs --policy; a plan is simulated with all its copies"
            )
        found = load(plan)
        timeline = found.simulate_steady() if found.chained else found.simulate()
        result = policies.result_of(found.schedule.policy, found.chain, timeline, own=True)
    else:
        setting, hop_s = _setting(plan, profile, gpus, microbatches)
        name = policy or "round_robin"
        if semantics != "full":
            _show_compute(setting, [name], hop_s, semantics, partition, as_json)
            return
        result = policies.simulate_policy(name, *setting, partition=partition)
    options.show(f"{_COLUMNS}\n{_row(result)}\n", _data(result), as_json)


def compare(
    plan: OptionalPlan = None,
    profile: options.ProfileFile = None,
    gpus: GpuCount = None,
    microbatches: options.SimulatedMicrobatches = None,
    semantics: Semantics = "full",
    as_json: options.Json = False,
) -> None:
    """Simulate every policy, each with its usual stages, side by side, and the plan if one is given."""
    from rpcompile import policies

    _check_semantics(semantics)
    if plan is not None and profile is None and gpus is None and microbatches is None and semantics == "full":
        from rpcompile.cli.reading import load

        results = policies.compare_policies(load(plan))
    else:
        setting, hop_s = _setting(plan, profile, gpus, microbatches)
        if semantics != "full":
            _show_compute(setting, list(policies.POLICIES), hop_s, semantics, None, as_json)
            return
        results = policies.compare_chain(*setting)
    lines = [_COLUMNS, *map(_row, results)]
    lines += [f"{result.policy}: {result.problem}" for result in results if result.problem]
    options.show("\n".join(lines) + "\n", [_data(result) for result in results], as_json)


COMMANDS = (simulate, compare)


def _check_semantics(semantics: str) -> None:
    from rpcompile.simulate_dispatch import SEMANTICS

    if semantics not in ("full", *SEMANTICS):
        raise InvalidArgument(f"semantics is {semantics!r}; choose one of full, {', '.join(SEMANTICS)}")


def _setting(
    plan: Path | None, profile: Path | None, gpus: int | None, microbatches: int | None
) -> tuple[_Setting, float | None]:
    """What a plan or a profile says, and a profile's seconds from GPU to GPU."""
    from rpcompile.cli.reading import load
    from rpcompile.profile import Profile

    if (plan is None) == (profile is None):
        raise InvalidArgument("give a PLAN or --profile FILE, one of them")
    if profile is not None:
        count, loaded = gpus or 8, Profile.load(profile)
        return _Setting(loaded.to_chain(), count, microbatches or 2 * count), loaded.hop_s
    assert plan is not None
    found = load(plan)
    count, parts = gpus or found.gpus, microbatches or found.microbatches
    return _Setting(found.chain, count, parts, found.mode, found.links, found.update_s_per_byte), None


def _show_compute(
    setting: _Setting,
    names: list[str],
    hop_s: float | None,
    semantics: str,
    partition: str | None,
    as_json: bool,
) -> None:
    """Prints policies by compute and hops alone; of several, what is wrong with one is in its row."""
    from rpcompile import policies

    chain, gpus, microbatches = setting[:3]
    lines, data = [_COMPUTE_COLUMNS], list[dict[str, Any]]()
    for name in names:
        row: dict[str, Any] = {"source": "simulated", "semantics": semantics, "policy": name}
        try:
            found = policies.simulate_compute(
                chain, name, gpus, microbatches, hop_s, semantics, partition=partition
            )
        except PartitionError as error:
            if len(names) == 1:
                raise
            lines.append(f"{name}: {error}")
            data.append(row | {"problem": str(error)})
            continue
        idle = [getattr(found.idle, f"{part}_s") for part in _PARTS]
        whole_s = gpus * found.makespan_s
        lines.append(
            f"{name:<17} {1e3 * found.makespan_s:>9.2f} ms {100 * found.bubble:>8.4f} %"
            + "".join(f"{100 * part_s / whole_s:>8.4f} %" for part_s in idle)
        )
        row |= {"iteration_s": found.makespan_s, "bubble": found.bubble, "problem": None}
        data.append(row | {"idle_s": dict(zip(_PARTS, idle, strict=True))})
    options.show("\n".join(lines) + "\n", data if len(names) > 1 else data[0], as_json)


def _row(result: PolicyResult) -> str:
    from rpcompile.units import seconds, size

    if result.problem:
        return f"{result.policy:<24} {'-':>10} {'-':>8} {'-':>10} {'-':>10}"
    fits = "" if result.fits else "  (over the GPU's memory)"
    return (
        f"{result.policy:<24} {seconds(result.iteration_s):>10} {100 * result.bubble:>6.1f} % "
        f"{size(max(result.gpu_peak_bytes)):>10} {size(result.upload_bytes):>10}{fits}"
    )


def _data(result: PolicyResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {"source": "simulated", **asdict(result)}
