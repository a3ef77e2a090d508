"""Files that nobody sees half written, and the folder for what can be made again."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_in_one_step(path: Path, content: bytes | str) -> None:
    """Writes a file, making its folder; another process, or one after a crash, sees the old or the new.

    What exists and is no file, as a pipe or `/dev/stdout`, is written to, and not replaced.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_dir():  # one without a name, as `.`, has no draft beside it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:  # which may name the draft, or no file at all
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rpcompile`, by default `~/.cache/rpcompile`; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rpcompile"
