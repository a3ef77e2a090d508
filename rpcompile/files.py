"""Files that nobody sees half written, and the folder for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def write_in_one_step(path: Path, text: str) -> None:
    """Writes `text`, making the folder if need be; another process sees the old file or the new one.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rpcompile`, by default `~/.cache/rpcompile`; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rpcompile"
