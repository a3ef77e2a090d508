from __future__ import annotations

import io
import time
from typing import Any

import pytest
from tqdm import tqdm

from rpcompile import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()

    def on_terminal(**options: Any) -> Any:
        return tqdm(file=found, **options)

    monkeypatch.setattr(progress, "tqdm", on_terminal)
    return found


def _wait_for(text: str, terminal: Terminal) -> None:
    deadline = time.monotonic() + 30
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.01)


def test_a_step_that_takes_long_is_shown_while_it_runs_and_taken_away(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 0.05)
    with progress.progress_bar(None) as bar:
        progress.announce(bar, "search-schedule")
        _wait_for("search-schedule", terminal)
    assert terminal.getvalue().endswith("\r")


def test_nothing_is_shown_of_what_is_short_or_unwanted(terminal: Terminal) -> None:
    for wanted in (None, False):
        with progress.progress_bar(wanted) as bar:
            progress.announce(bar, "search-schedule")
    assert terminal.getvalue().strip() == ""


def test_the_bar_ends_with_an_error(terminal: Terminal) -> None:
    with pytest.raises(KeyError), progress.progress_bar(True) as bar:
        bar.update({}["capture-graph"])
    shown = terminal.getvalue()
    time.sleep(0.05)
    assert terminal.getvalue() == shown
