"""Every benchmark can at least be loaded: nothing that it names has moved away."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[1].glob("benchmarks/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_loads(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(script.parent))  # as when it is run
    assert runpy.run_path(str(script), run_name="loaded")["__doc__"]
