"""How fast plan files load, and that damaged ones give clean errors in bounded time and memory.

python benchmarks/plan_file.py [--mutants 100000]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rpcompile.errors import PlanFileError  # noqa: E402
from rpcompile.plan import Plan  # noqa: E402
from rpcompile.planner import PlanOptions, plan_profile  # noqa: E402
from rpcompile.profile import Profile  # noqa: E402
from tests.mutated_plans import mutate  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "plan_file.json"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "msgspec": msgspec.__version__},
            "load": _load_speed(Path(folder)),
            "mutants": _mutants(Path(folder), options.mutants),
        }
    for name in ("load", "mutants"):
        for key, value in result[name].items():
            print(f"{name:<8} {key:<28} {value}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def _load_speed(folder: Path) -> dict[str, Any]:
    """CPU seconds to read and check a plan of some 20,000 instructions, without its proof."""
    profile = Profile.load(ROOT / "benchmarks" / "profiles" / "qwen3-32b.json")
    plan = plan_profile(profile, PlanOptions(8, 32, solver_time_s=1.0, effort=None), "qwen3-32b")
    plan.save(folder / "large.json")
    seconds: list[float] = []
    for _ in range(9):
        gc.collect()
        began = time.process_time()
        loaded = Plan.load(folder / "large.json", verify=False)
        seconds.append(time.process_time() - began)
        del loaded
    count = sum(1 for _ in plan.schedule.actions())
    median = statistics.median(seconds)
    return {
        "instructions": count,
        "file_bytes": (folder / "large.json").stat().st_size,
        "load_s": median,
        "load_s_per_20000_instructions": median / count * 20_000,
    }


def _mutants(folder: Path, count: int) -> dict[str, Any]:
    """What happens to damaged copies of a small plan."""
    profile = Profile.load(ROOT / "benchmarks" / "profiles" / "qwen3-1.7b.json")
    short = msgspec.structs.replace(profile, segments=(*profile.segments[:2], profile.segments[-1]))
    plan = plan_profile(short, PlanOptions(2, 2, solver_time_s=0.5, effort=None), "small")
    plan = replace(plan, provenance={})
    path = folder / "small.json"
    plan.save(path)
    content, rng = path.read_bytes(), random.Random(SEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = held = 0
    longest = 0.0
    for _ in range(count):
        path.write_bytes(mutate(content, rng))
        began = time.process_time()
        try:
            Plan.load(path)
            held += 1
        except PlanFileError:
            refused += 1
        longest = max(longest, time.process_time() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seed": SEED,
        "files": count,
        "refused_with_PlanFileError": refused,
        "still_hold": held,
        "other_errors": 0,  # any would have ended the run
        "longest_load_s": longest,
        "memory_growth_bytes": 1024 * (after - before),
    }


if __name__ == "__main__":
    main()
