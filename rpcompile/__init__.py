"""rpcompile: a graph-partitioning compiler for fine-tuning models bigger than your GPUs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcompile.api import compile
    from rpcompile.compiled import Compiled
    from rpcompile.plan import Plan

__version__ = "0.1.0"
__all__ = ["Compiled", "Plan", "compile"]

_HOMES = {"Compiled": "rpcompile.compiled", "Plan": "rpcompile.plan", "compile": "rpcompile.api"}


def __getattr__(name: str) -> object:
    # torch takes seconds to import; reading a version or a plan need not.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
