"""One error class for each mistake a user can see.

Every message says what failed (value against limit), where, and what to change.
"""

from __future__ import annotations


class RpcompileError(Exception):
    """Base of every error that rpcompile raises on purpose."""


class MissingExampleInputs(RpcompileError):
    """The model's inputs cannot be inferred and no example was given."""


class InvalidArgument(RpcompileError, ValueError):
    """An argument is outside its range or of the wrong type."""


class CaptureError(RpcompileError):
    """torch.export cannot capture the model's graph."""


class UnsupportedModel(RpcompileError):
    """The captured graph has a property that rpcompile cannot honour."""


class BatchError(RpcompileError, ValueError):
    """A batch does not fit the compiled program: names, shapes or divisibility."""


class PartitionError(RpcompileError):
    """The segments cannot be divided as asked."""


class StageTooLarge(PartitionError):
    """One segment alone needs more memory than a GPU has."""


class ScheduleError(RpcompileError):
    """A schedule violates a property that `verify` proves."""


class PlanFileError(RpcompileError):
    """A plan file cannot be read or written."""


class ProfileFileError(RpcompileError):
    """A profile file cannot be read, or something in it is wrong."""


class CheckpointError(RpcompileError):
    """A checkpoint cannot be written or read, or is of another model or optimizer."""


class PlanMismatch(RpcompileError):
    """A plan was made for another model or another arrangement."""


class ExecutionError(RpcompileError):
    """An instruction failed while the program ran."""


class WorkerTimeout(ExecutionError):
    """No instruction came to its end within `timeout_s`; the message says who waits for whom."""


class NonFinite(ExecutionError):
    """With `detect_nan=True`: a result or gradient is NaN or infinite."""


class NotBuiltYet(RpcompileError, NotImplementedError):
    """A documented option whose implementation is not in this version."""


def require_at_least(least: int, **values: float) -> None:
    """Refuses options that are too small, or not numbers.

    Args:
        least: What each may be at least.
        values: Option -> value.

    Raises:
        InvalidArgument: Naming the first that is.
    """
    for option, value in values.items():
        if not value >= least:
            raise InvalidArgument(f"{option}={value} must be at least {least}")
