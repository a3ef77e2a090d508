"""How large a report of some 10,000 bars is, and how long headless Chromium takes to open and draw it.

python benchmarks/report_speed.py
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import bokeh

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rpcompile.gantt import bars  # noqa: E402
from rpcompile.planner import PlanOptions, plan_profile  # noqa: E402
from rpcompile.profile import Profile  # noqa: E402
from rpcompile.report import write_report  # noqa: E402
from rpcompile.report.timeline import MOST_BARS  # noqa: E402
from tests.chromium import Page  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "report_speed.json"
OPENINGS = 5


def main() -> None:
    profile = Profile.load(ROOT / "benchmarks" / "profiles" / "qwen3-1.7b.json")
    plan = plan_profile(profile, PlanOptions(8, 168, solver_time_s=1.0, effort=None), "qwen3-1.7b")
    count = len(bars(plan.schedule, plan.simulate(), MOST_BARS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        began = time.perf_counter()
        write_report(plan, path, compare=False)
        written_s = time.perf_counter() - began
        with Page() as page:
            opened = [page.open(path) for _ in range(OPENINGS)]
            problems = page.problems
        nbytes = path.stat().st_size
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "bokeh": bokeh.__version__},
        "bars": count,
        "file_bytes": nbytes,
        "write_s": written_s,
        "open_and_draw_s": {"median": statistics.median(opened), "longest": max(opened)},
        "console_problems": problems,
    }
    for key, value in result.items():
        print(f"{key:<20} {value}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
