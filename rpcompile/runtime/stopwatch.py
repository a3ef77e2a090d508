"""Times stages alone on a device, on made-up tensors."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rpcompile.errors import InvalidArgument
from rpcompile.ir import StageKind
from rpcompile.runtime.stage_runner import Microbatch, StageRunner, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rpcompile.ir import StageGraph


@dataclass(frozen=True)
class Stopwatch:
    """Median time of one microbatch of a stage.

    Args:
        device: Where to run, e.g. "cpu" or "cuda:0".
        repeats: Timed runs of each stage.
        warmup: Runs before those.

    Raises:
        InvalidArgument: The device is not here.
    """

    device: str = "cpu"
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InvalidArgument(f"device {self.device!r} is unknown; use cpu or cuda:<number>") from error
        found = torch.cuda.device_count()
        if device.type not in ("cpu", "cuda", "meta"):  # meta computes nothing, which tests make use of
            raise InvalidArgument(f"device {self.device!r} cannot be measured; use cpu or cuda:<number>")
        if device.type == "cuda" and (device.index or 0) >= found:
            raise InvalidArgument(
                f"device {self.device!r} is not here: torch {torch.__version__} sees {found} CUDA devices; "
                "use cpu"
            )

    def machine(self) -> dict[str, str]:
        """What times depend on besides the stage."""
        device = torch.device(self.device)
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        else:
            processor = platform.processor() or platform.machine()
            name = f"{device.type}, {processor}, {torch.get_num_threads()} threads"
        return {"device": name, "torch": torch.__version__, "repeats": str(self.repeats)}

    def seconds(
        self,
        graph: StageGraph,
        loss: str,
        weights: Tensors,
        inputs: Tensors,
        values: Tensors,
        gradients: Tensors,
        sizes: Mapping[str, int],
    ) -> float:
        """What `StageRunner` takes for the stage: forward; recompute and backward; or both at once.

        Args:
            graph: The stage.
            loss: Name of the node that is the loss.
            weights: Its parameters and buffers by qualified name; only shapes and dtypes matter here and
                below, so they may be on the meta device.
            inputs: User inputs by name.
            values: Incoming boundary values by node name.
            gradients: Gradients of the outgoing boundary by node name.
            sizes: Symbol name -> size.
        """
        device = torch.device(self.device)
        runner = StageRunner(graph, loss, device)
        segments = [_made_up(weights, device)]
        tensors = _made_up(inputs, device), _made_up(values, device)
        microbatch = Microbatch(0, sizes, 1.0)
        if graph.stage.kind is StageKind.F:
            return self._median(lambda: runner.forward(segments, *tensors, microbatch))
        if graph.stage.kind is StageKind.FB:
            return self._median(lambda: runner.fused(segments, *tensors, microbatch))
        incoming = _made_up(gradients, device)
        return self._median(
            lambda: runner.backward(runner.recompute(segments, *tensors, microbatch), incoming)
        )

    def _median(self, run: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(self.warmup + self.repeats):
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[self.warmup :])

    def _synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


def _made_up(like: Tensors, device: torch.device) -> Tensors:
    """Small random numbers; zeros for integers, which are valid positions in any table."""
    made: Tensors = {}
    for name, tensor in like.items():
        made[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        if tensor.dtype.is_floating_point:
            made[name].normal_(0, 0.02)
    return made
