"""Random numbers that do not depend on who draws them, or when.

Every operator of the graph that draws random numbers has its own stream, and every microbatch its
own seed. Recompute, another cut or another number of GPUs therefore give the same dropout masks.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MASK = (1 << 64) - 1
# The default generator of a device is shared by all threads, and most operators take no other.
_lock = threading.Lock()
_current = threading.local()


def stream_seed(seed: int, number: int) -> int:
    """Seed of one operator's stream.

    Args:
        seed: Seed of the microbatch.
        number: Position of the operator among the graph's random ones.

    Returns:
        An int in [0, 2**63).

    Source: the splitmix64 finaliser (Steele, Lea, Flood 2014).
    """
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) >> 1


@contextmanager
def microbatch_seed(seed: int) -> Iterator[None]:
    """Random operators run by this thread use streams of `seed`."""
    before = getattr(_current, "seed", None)
    _current.seed = seed
    try:
        yield
    finally:
        _current.seed = before


def seeded(operator: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
    """Runs a random operator on its own stream and leaves the default generator as it was."""
    made_on = torch.device(kwargs.get("device") or "cpu")
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), made_on)
    generator = (
        torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    )
    with _lock:
        state = generator.get_state()
        generator.manual_seed(stream_seed(_current.seed, number))
        try:
            return operator(*args, **kwargs)
        finally:
            generator.set_state(state)
