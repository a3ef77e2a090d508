"""`benchmarks/gpu_long_sequences.py` on the CPU, so that it works when somebody has a GPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_long_sequences as script
from rpcompile.hardware import lookup

SMALL = replace(lookup("rtx4090"), usable_bytes=12_000_000)


def test_where_the_longest_does_not_fit_shorter_ones_are_tried() -> None:
    rows: list[dict[str, Any]] = []
    found = script.few_layers(True, SMALL, 460, lambda part, row: rows.append(row))
    assert found is not None
    assert found is rows[-1]
    assert [row["tokens"] for row in rows] == [int(share * 460) for share in script.SHORTER[: len(rows)]]
    assert len(rows) > 1
    assert rows[0]["failed"].startswith("StageTooLarge: ")
    assert all("failed" in row for row in rows[:-1])
    assert found["predicted_peak_bytes"] <= SMALL.usable_bytes
    assert found["loss"] > 0
    assert found["seconds"] > 0


def test_what_would_take_longer_than_is_left_is_left_out() -> None:
    rows: list[dict[str, Any]] = []
    few = {"layers": 4, "tokens": 2 * script.FIVE_TIMES_PUBLISHED, "seconds": 100.0}
    script.all_layers(few, SMALL, time.monotonic() + 20, lambda part, row: rows.append(row))
    (row,) = rows
    assert row["tokens"] == script.FIVE_TIMES_PUBLISHED
    assert row["expected_s"] == pytest.approx(100 * 28 / 4 / 4)
    assert row["failed"].startswith("left out: ")


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "found.json"

    def peaks(lengths: list[int], dry: bool, keep: script.Keep) -> None:
        assert (lengths, dry) == ([512], True)
        keep("peaks", {"tokens": 512})
        assert json.loads(output.read_text())["peaks"] == [{"tokens": 512}]
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "peaks", peaks)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--dry", "--lengths", "512", "--output", str(output)])
    assert json.loads(output.read_text())["device"] == "cpu, dry run"


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main([])
