"""`explain`: why a plan is as it is, and what would help."""

from __future__ import annotations

from rpcompile.cli import options
from rpcompile.cli.reading import load


def explain(plan: options.PlanFile, as_json: options.Json = False) -> None:
    """Say why these stages, what bounds each, and what would help next (each simulated)."""
    from rpcompile.explain import explain as ask

    found = ask(load(plan))
    options.show(str(found), found.as_dict(), as_json)


COMMANDS = (explain,)
