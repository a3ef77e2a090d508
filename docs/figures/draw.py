"""Draws the figures of docs/dispatch.md from real plans: `python docs/figures/draw.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

from rpcompile.planner import PlanOptions, plan_profile
from rpcompile.policies import default_partition, schedule_policy
from rpcompile.profile import Profile
from rpcompile.simulate import simulate

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json"


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "rpcompile"  # the same file each time
    profile = Profile.load(PROFILE)
    plan = plan_profile(profile, PlanOptions(4, 8, solver_time_s=5.0), "Qwen3-1.7B, round robin")
    plan.plot(HERE / "round_robin.svg")
    stages = default_partition(plan.chain, "gpipe", 4)
    schedule = schedule_policy(plan.chain, stages, "gpipe", 4, 8)
    timeline = simulate(schedule)
    prediction = replace(plan.prediction, iteration_s=timeline.makespan_s, bubble=timeline.bubble)
    gpipe = replace(
        plan, model_name="Qwen3-1.7B, GPipe", partition=stages, schedule=schedule, prediction=prediction
    )
    gpipe.plot(HERE / "gpipe.svg")


if __name__ == "__main__":
    main()
