"""`simulate` and `compare`: what a plan, or any policy on a profile, would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpcompile.cli import options
from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain
    from rpcompile.policies import PolicyResult

OptionalPlan = Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="A plan file; or use --profile.")]
_COLUMNS = f"{'policy':<24} {'iteration':>10} {'bubble':>8} {'GPU peak':>10} {'uploads':>10}"


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
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="With --profile: number of GPUs (8).")
    ] = None,
    microbatches: options.Microbatches = None,
    as_json: options.Json = False,
) -> None:
    """Simulate a plan, or a policy with its usual or given stages."""
    from rpcompile import policies
    from rpcompile.simulate import simulate as run

    if plan is not None and profile is None and policy is None and partition is None:
        from rpcompile.cli.reading import load

        if gpus is not None or microbatches is not None:
            raise InvalidArgument(
                "--gpus and --microbatches need --policy or --profile; the plan has its own"
            )
        found = load(plan)
        timeline = found.simulate_steady() if found.chained else found.simulate()
        result = policies.result_of(found.schedule.policy, found.chain, timeline, own=True)
    else:
        chain, count, parts = _chain(plan, profile, gpus, microbatches)
        name = policy or "round_robin"
        policies.check_policy(name)
        stages = (
            policies.default_partition(chain, name, count)
            if partition is None
            else policies.parse_partition(partition, chain)
        )
        timeline = run(policies.schedule_policy(chain, stages, name, count, parts))
        result = policies.result_of(name, chain, timeline, own=True)
    options.show(f"{_COLUMNS}\n{_row(result)}\n", _data(result), as_json)


def compare(
    plan: OptionalPlan = None,
    profile: options.ProfileFile = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="With --profile: number of GPUs (8).")
    ] = None,
    microbatches: options.Microbatches = None,
    as_json: options.Json = False,
) -> None:
    """Simulate every policy, each with its usual stages, side by side, and the plan if one is given."""
    from rpcompile import policies

    if plan is not None and profile is None and gpus is None and microbatches is None:
        from rpcompile.cli.reading import load

        results = policies.compare_policies(load(plan))
    else:
        results = policies.compare_chain(*_chain(plan, profile, gpus, microbatches))
    lines = [_COLUMNS, *map(_row, results)]
    lines += [f"{result.policy}: {result.problem}" for result in results if result.problem]
    options.show("\n".join(lines) + "\n", [_data(result) for result in results], as_json)


COMMANDS = (simulate, compare)


def _chain(
    plan: Path | None, profile: Path | None, gpus: int | None, microbatches: int | None
) -> tuple[SegmentChain, int, int]:
    """The chain of a plan or a profile, GPUs and microbatches."""
    from rpcompile.cli.reading import load
    from rpcompile.profile import Profile

    if (plan is None) == (profile is None):
        raise InvalidArgument("give a PLAN or --profile FILE, one of them")
    if profile is not None:
        count = gpus or 8
        return Profile.load(profile).to_chain(), count, microbatches or 2 * count
    assert plan is not None
    found = load(plan)
    return found.chain, gpus or found.gpus, microbatches or found.microbatches


def _row(result: PolicyResult) -> str:
    from rpcompile.plan import seconds, size

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
