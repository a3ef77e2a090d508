"""A progress bar over passes."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

_DELAY_S = 2.0
_EVERY_S = 1.0


@contextmanager
def progress_bar(progress: bool | None) -> Iterator[tqdm[Any]]:
    """A bar over the passes, whose time runs on while one of them takes long.

    Args:
        progress: Whether to show it; None: after two seconds, if standard error is a terminal.
    """
    disable, delay_s = (None, _DELAY_S) if progress is None else (not progress, 0.0)
    with tqdm(
        total=12, desc="capture", leave=False, disable=disable, delay=delay_s, miniters=0, mininterval=0
    ) as bar:
        over = threading.Event()

        def tick() -> None:
            wait_s = delay_s
            while not over.wait(wait_s):
                bar.update(0)
                wait_s = _EVERY_S

        ticking = threading.Thread(target=tick, name="progress", daemon=True)
        if not bar.disable:
            ticking.start()
        try:
            yield bar
        finally:
            over.set()
            if not bar.disable:
                ticking.join()


def announce(bar: tqdm[Any] | None, step: str) -> None:
    """Shows that a step begins."""
    if bar is not None:
        bar.set_description(step, refresh=False)
        bar.update()
