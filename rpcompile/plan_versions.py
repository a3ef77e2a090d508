"""Versions of the plan file, and how an old one becomes a new one.

To change the file: raise `VERSION`, and add a function that turns the JSON of the version before into that
of the new one. Files are upgraded step by step, so each function knows two versions only. Where schedules
have become different, raise `SCHEDULED_SINCE`, too: those of older files are laid out again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcompile.errors import PlanFileError

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 4
SCHEDULED_SINCE = 3
"""Version from which on schedules are as they are now: RECOMPUTE is an action of its own."""


def _from_1(plan: dict[str, Any]) -> dict[str, Any]:
    """Version 2 says what each class of operators costs, `chain.op_classes`."""
    return {**plan, "chain": {**plan["chain"], "op_classes": []}}


def _from_2(plan: dict[str, Any]) -> dict[str, Any]:
    """Version 3 has other schedules, and says which segments run again in tiles; before, none did."""
    return plan


def _from_3(plan: dict[str, Any]) -> dict[str, Any]:
    """Version 4 knows GPUs that are not alike, shared links and asynchronous plans; the rest stays."""
    return plan


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2, 3: _from_3}
"""Version -> what makes its `plan` one of the next version."""


def upgrade(plan: Any, version: int) -> dict[str, Any]:
    """The `plan` part of a file of an older version as one of `VERSION`.

    Raises:
        PlanFileError: It lacks what its version has.
    """
    for step in range(version, VERSION):
        try:
            plan = _STEPS[step](plan)
        except (KeyError, TypeError) as error:
            raise PlanFileError(f"it is no plan of version {step}: {error} is missing") from error
    return plan


def known(version: int) -> bool:
    """Whether files of this version can be read."""
    return version == VERSION or version in _STEPS
