"""Plain PyTorch on the same microbatches: what every result is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rpcompile.random_streams import stream_seed
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


class Reseed(TorchFunctionMode):
    """Gives each dropout (and `rand`, `bernoulli_`, ...) the random stream that rpcompile documents for it.

    The only thing that is not plain PyTorch: without it the eager model would draw the same masks in
    another order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._number = seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random = False
        if func is functional.dropout:
            random = kwargs.get("training", True) and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0
        elif func is functional.scaled_dot_product_attention:
            random = kwargs.get("dropout_p", 0.0) > 0
        elif func in (torch.rand, torch.rand_like, torch.Tensor.bernoulli_, torch.Tensor.normal_):
            random = True
        if random:
            # The generator of every device, of which one draws.
            torch.manual_seed(stream_seed(self._seed, self._number))
            self._number += 1
        return func(*args, **kwargs)


def draw_seed() -> int:
    """The draw that `forward_backward` makes from the default generator."""
    return int(torch.randint(1 << 62, ()).item())


@contextmanager
def kept_generator() -> Iterator[None]:
    """Restores the default generator's state afterwards."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def loss_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output["loss"]


def forward_backward(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    microbatches: int,
    random: bool,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> torch.Tensor:
    """The usual accumulation loop: `(loss / n).backward()` a microbatch, the forward under `context`."""
    seed = draw_seed() if random else 0
    total = torch.zeros(())
    with kept_generator():
        for index in range(microbatches):
            part = {name: models.part(name, value, microbatches, index) for name, value in batch.items()}
            with Reseed(stream_seed(seed, index)), context():
                loss = loss_of(model(**part)) / microbatches
            loss.backward()
            total += loss.detach().cpu()
    return total
