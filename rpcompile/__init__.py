"""rpcompile: a graph-partitioning compiler for fine-tuning models bigger than your GPUs."""

from __future__ import annotations

from rpcompile.api import compile
from rpcompile.compiled import Compiled
from rpcompile.plan import Plan

__version__ = "0.1.0"
__all__ = ["Compiled", "Plan", "compile"]
