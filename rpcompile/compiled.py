"""What `rpcompile.compile` returns: a model that trains through its program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.errors import BatchError, InvalidArgument, UnsupportedModel
from rpcompile.random_streams import stream_seed
from rpcompile.runtime import batches
from rpcompile.runtime.engine import Engine
from rpcompile.runtime.stage_runner import Microbatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from rpcompile.ir import Capture, Program
    from rpcompile.plan import Plan
    from rpcompile.runtime.stage_runner import Tensors


@dataclass(frozen=True)
class Executable:
    """A plan, its program, and the workers that run it."""

    plan: Plan
    program: Program
    engine: Engine


class Compiled:
    """A model and the program that trains it.

    Parameters, buffers and gradients stay on the host, in the model's own tensors: optimizers,
    LR schedulers, gradient clipping, `state_dict` and `save_pretrained` work on `compiled.model`
    as they always do.

    Attributes:
        model: The model given to `compile`.
        plan: What will be done, and the prediction of what it costs.
        program: The instructions, one torch.fx graph a GPU; print it to read them.
    """

    def __init__(
        self, model: nn.Module, training: Executable, evaluation: Callable[[int], Executable]
    ) -> None:
        self.model = model
        self.plan = training.plan
        self.program = training.program
        self._training = training
        self._make_evaluation = evaluation
        self._evaluations: dict[int, Executable] = {}

    def forward_backward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Runs every microbatch forward and backward and adds the gradients to `.grad`.

        The batch is split along dimension 0 into `plan.microbatches` equal parts. The loss is the mean
        over microbatches of the model's loss; if `num_items_in_batch` is among the inputs, each
        microbatch's loss is already divided by the whole batch's token count, and the loss is their sum.

        Args:
            *args, **kwargs: The tensors that the model was compiled for, for the whole batch, on the host.

        Returns:
            The loss, a detached scalar.

        Raises:
            BatchError: The batch does not fit what was compiled.
            InvalidArgument: It is called under another autocast than the model was compiled under.
            ExecutionError: An instruction failed; the model, its gradients and buffers are unchanged.
        """
        capture = self.program.capture
        _check_autocast(capture)
        batch = batches.named_batch(capture, args, kwargs)
        parts = batches.split_batch(capture, batch, self.plan.microbatches)
        summed = "num_items_in_batch" in batch
        scale = 1.0 if summed else 1.0 / len(parts)
        result = self._training.engine.run(
            self._tensors(capture), parts, _microbatches(capture, parts, scale)
        )
        self._commit(result.gradients, result.states)
        losses = [outputs["loss"] for outputs in result.outputs]
        total = torch.zeros_like(losses[0])
        for loss in losses:
            total += loss if summed else loss / len(parts)
        return total

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Applies `optimizer` to the gradients that `forward_backward` left.

        Raises:
            InvalidArgument: The optimizer holds none of this model's parameters.
        """
        mine = {id(parameter) for parameter in self.model.parameters()}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not mine & held:
            raise InvalidArgument(
                f"{type(optimizer).__name__} holds no parameter of {type(self.model).__name__}; "
                f"make it from compiled.parameters()"
            )
        optimizer.step()

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Evaluates a batch: the model's forward in eval mode, without gradients, stage by stage.

        The first call captures the model once more, in eval mode.

        Args:
            *args, **kwargs: As for `forward_backward`; any batch size.

        Returns:
            The model's output for the whole batch. The loss is the mean over microbatches; outputs
            that the model makes before its last segment (hidden states) are None.
        """
        capture = self.program.capture
        _check_autocast(capture)
        batch = batches.named_batch(capture, args, kwargs)
        sizes = [
            batch[spec.name].shape[spec.batch_dim] for spec in capture.inputs if spec.batch_dim is not None
        ]
        if 0 in sizes:
            raise BatchError("the batch is empty")
        count = batches.largest_divisor(sizes[0], self.plan.microbatches) if sizes else 1
        if count not in self._evaluations:
            self._evaluations[count] = self._make_evaluation(count)
        executable = self._evaluations[count]
        capture = executable.program.capture
        parts = batches.split_batch(capture, batch, count)
        result = executable.engine.run(self._tensors(capture), parts, _microbatches(capture, parts, 1.0))
        return batches.join_outputs(capture, result.outputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters that require a gradient, for an optimizer."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """The model's `state_dict`."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Loads into the model; the next iteration uses what was loaded."""
        return self.model.load_state_dict(state, strict=strict)

    def close(self) -> None:
        """Ends the worker threads. Also done when the object is collected."""
        for executable in (self._training, *self._evaluations.values()):
            executable.engine.close()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensors(self, capture: Capture) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
            **capture.constants,
        }
        absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
        if absent:
            raise UnsupportedModel(
                f"{type(self.model).__name__} has no weights to run with ({absent[0]} is on the meta "
                f"device); its plan can be inspected, or load weights first"
            )
        return tensors

    def _commit(self, gradients: Tensors, states: Tensors) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        stored = dict(self.model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameter = parameters[name]
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)
            for name, value in states.items():
                stored[name].copy_(value)


def _microbatches(capture: Capture, parts: list[Tensors], scale: float) -> list[Microbatch]:
    # Drawn from the default generator, so torch.manual_seed makes a run repeatable.
    seed = int(torch.randint(1 << 62, ()).item()) if capture.random else 0
    return [
        Microbatch(stream_seed(seed, index), batches.microbatch_sizes(capture, part), scale)
        for index, part in enumerate(parts)
    ]


def _check_autocast(capture: Capture) -> None:
    """Stages run under the autocast that was on at compile time; another one now would be ignored."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != capture.autocast:
            raise InvalidArgument(
                f"called under autocast to {torch.get_autocast_dtype(device)}, but compiled under "
                f"{capture.autocast or 'none'}; call rpcompile.compile under the autocast that you train with"
            )
