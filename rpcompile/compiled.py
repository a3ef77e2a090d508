"""What `rpcompile.compile` returns: a model that trains through its program."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import checkpoint, model_checks
from rpcompile.errors import ExecutionError, InvalidArgument
from rpcompile.model_loss import COUNT
from rpcompile.random_streams import stream_seed
from rpcompile.runtime import batches
from rpcompile.runtime.engine import Engine
from rpcompile.runtime.host_weights import HostWeights
from rpcompile.runtime.in_flight import InFlight
from rpcompile.runtime.interrupts import uninterrupted
from rpcompile.runtime.read_guard import unguarded
from rpcompile.runtime.stage_runner import Microbatch
from rpcompile.runtime.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future
    from os import PathLike

    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim.lr_scheduler import LRScheduler

    from rpcompile.ir import Capture, Program
    from rpcompile.plan import Plan
    from rpcompile.runtime.flight import Result
    from rpcompile.runtime.stage_runner import Tensors


@dataclass(frozen=True)
class Executable:
    """A plan, its program, and the workers that run it."""

    plan: Plan
    program: Program
    engine: Engine


@dataclass(frozen=True)
class TrainingOptions:
    """How a compiled model trains; see `rpcompile.compile`."""

    mode: str = "sync"
    compute_dtype: torch.dtype | None = None
    grad_scaler: GradScaler | None = None


@dataclass(frozen=True)
class Makers:
    """Makes the programs that are not always needed: with outputs, and for evaluation by microbatches."""

    with_outputs: Callable[[], Executable]
    evaluation: Callable[[int], Executable]


class Compiled:
    """A model and the program that trains it.

    Parameters, buffers and gradients stay on the host, in the model's own tensors: optimizers,
    LR schedulers, gradient clipping, `state_dict` and `save_pretrained` work on `compiled.model`
    as they always do. Whoever reads one of them waits for the updates that are in flight.

    Attributes:
        model: The model given to `compile`.
        plan: What will be done, and the prediction of what it costs.
        program: The instructions, one torch.fx graph a GPU; print it to read them.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        training: Executable,
        makers: Makers,
        options: TrainingOptions,
    ) -> None:
        """`module`: what was captured, the model itself or the model with its loss."""
        self.model = model
        self.plan = training.plan
        self.program = training.program
        self._module = module
        self._training = training
        self._makers = makers
        self._options = options
        self._modes = model_checks.modes(model)
        self._evaluations: dict[int, Executable] = {}
        self._updates = Updates([segment.name for segment in training.plan.chain.segments])
        trainable = frozenset(spec.name for spec in self.program.capture.parameters if spec.trainable)
        self._weights = HostWeights(
            self.program.weights, trainable, self._updates, options.compute_dtype, options.mode == "async"
        )
        self._in_flight = InFlight(self._updates, self._weights)

    # ------------------------------------------------------------------- training

    def forward_backward(
        self, *args: torch.Tensor, return_outputs: bool = False, **kwargs: torch.Tensor
    ) -> Any:
        """Runs every microbatch forward and backward and adds the gradients to `.grad`.

        The batch is split along dimension 0 into `plan.microbatches` parts, of which the first have one
        row more where it does not divide. The loss is the mean over rows of the microbatches' losses; if
        `num_items_in_batch` is among the inputs, each microbatch's loss is already divided by the whole
        batch's token count, and the loss is their sum.

        In mode "async" it returns, from the second call on, when the iteration has been enqueued behind the
        one before it; whoever reads the loss, or a gradient, waits for it (`loss.item()`: torch copies
        `torch.tensor(loss)` without asking). At most two are in flight. Read a loss one call later, for
        nothing overlaps while you wait. With `return_outputs` it waits itself.

        Args:
            *args, **kwargs: The tensors that the model was compiled for, for the whole batch, on the host.
            return_outputs: Return what the model returns as well, microbatches joined as in evaluation.
                The first time, a second program is written for it.

        Returns:
            The loss, a detached scalar, at least float32; or the loss and the outputs.

        Raises:
            BatchError: The batch does not fit what was compiled.
            InvalidArgument: It is called under another autocast than the model was compiled under.
            ExecutionError: An instruction failed; the model, its gradients and buffers are unchanged. Or
                an update that was still in flight did, or an earlier call's iteration: then it and what was
                called behind it are undone, and the next call computes with the weights as they are.
        """
        overlaps = self._options.mode == "async" and self._in_flight.ready and not return_outputs
        executable = self._with_outputs if return_outputs else self._training
        capture = executable.program.capture
        self._check_training(capture)
        self._updates.raise_failed()
        batch = batches.named_batch(capture, *self._cast(args, kwargs))
        model_checks.check_inputs(batch)
        if overlaps:  # the caller may use its memory again
            batch = {name: value.clone() for name, value in batch.items()}
        parts = batches.split_batch(capture, batch, self.plan.microbatches)
        summed, shares = COUNT in batch, batches.row_weights(capture, parts)
        scales = [1.0] * len(parts) if summed else shares or [1.0 / len(parts)] * len(parts)
        grown = [scale * self._loss_scale() for scale in scales]
        microbatches = _microbatches(capture, parts, grown)

        def loss_of(result: Result) -> torch.Tensor:
            return batches.total_loss(capture, result.outputs, shares, summed)

        self._in_flight.make_room(executable.engine.capacity if overlaps else 1)
        try:
            with unguarded():  # the engine waits for each segment's update
                tensors, pending = self._weights.for_iteration(self._tensors(capture))
                if overlaps:
                    return self._overlap(tensors, parts, microbatches, pending, loss_of)
                result = executable.engine.run(tensors, parts, microbatches, pending)
        except ExecutionError as error:
            self._updates.forget(error)
            raise
        self._commit(result.gradients, result.states)
        self._in_flight.note(result)
        total = loss_of(result)
        if return_outputs:
            return total, batches.join_outputs(capture, result.outputs, shares, total)
        return total

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Applies `optimizer` to the gradients that `forward_backward` left, in the background.

        Equal to `optimizer.step()` bit for bit. Each segment's update is queued, first layers first; the
        next `forward_backward` starts behind them, and whoever reads a parameter, gradient or state waits.
        Optimizers whose update of one parameter depends on others step at once. With a gradient scaler,
        gradients are unscaled, and the step is skipped if one is not finite, as `scaler.step` does.

        Call `wait` before you use torch.export or torch.compile yourself: while either traces, torch's
        optimizers (`fused=True` aside) round differently, in every thread of the process.

        Raises:
            InvalidArgument: The optimizer holds none of this model's parameters, or needs a closure.
            ExecutionError: An earlier update failed.
        """
        self._check_open()
        mine = {id(parameter) for parameter in self.model.parameters()}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not mine & held:
            raise InvalidArgument(
                f"{type(optimizer).__name__} holds no parameter of {type(self.model).__name__}; "
                f"make it from compiled.parameters()"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InvalidArgument(
                "LBFGS evaluates the loss several times a step; call optimizer.step(closure) with a closure "
                "that calls optimizer.zero_grad() and returns compiled.forward_backward(...)"
            )
        scaler = self._options.grad_scaler
        if scaler is None or not scaler.is_enabled():
            self._step(optimizer)
            return
        own = optimizer.__dict__.pop("step", None)

        def restore() -> None:
            optimizer.__dict__.pop("step", None)
            if own is not None:
                optimizer.__dict__["step"] = own

        def step() -> None:
            restore()
            self._step(optimizer)

        # The scaler calls `optimizer.step` unless gradients are not finite.
        optimizer.__dict__["step"] = step
        try:
            scaler.step(optimizer)
        finally:
            restore()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_` on this model's parameters, scaling within the next `step`.

        Args:
            max_norm: Largest norm.
            norm_type: Which norm; may be infinity.
            error_if_nonfinite: Raise RuntimeError if the norm is not finite.

        Returns:
            The norm of all gradients before clipping, a scalar.
        """
        return self._updates.clip_grad_norm_(self.parameters(), max_norm, norm_type, error_if_nonfinite)

    def wait(self) -> None:
        """Returns when no update is in flight. Reading a parameter, gradient or state does the same.

        Raises:
            ExecutionError: An update failed.
        """
        self._updates.wait()

    # ------------------------------------------------------------------- evaluation

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Evaluates a batch: the model's forward in eval mode, without gradients, stage by stage.

        The first call captures the model once more, in eval mode.

        Args:
            *args, **kwargs: As for `forward_backward`; any batch size.

        Returns:
            The model's output for the whole batch (with `loss_fn`: the loss and the output). The loss is
            as in `forward_backward`; outputs that the model makes before its last segment (hidden states)
            are None.
        """
        self._check_open()
        capture = self.program.capture
        model_checks.check_autocast(capture)
        batch = batches.named_batch(capture, *self._cast(args, kwargs))
        count = batches.evaluation_parts(capture, batch, self.plan.microbatches)
        self._updates.wait()
        if count not in self._evaluations:
            self._evaluations[count] = self._makers.evaluation(count)
        executable = self._evaluations[count]
        capture = executable.program.capture
        parts = batches.split_batch(capture, batch, count)
        tensors = self._weights.for_evaluation(self._tensors(capture))
        result = executable.engine.run(tensors, parts, _microbatches(capture, parts, [1.0] * count))
        shares = batches.row_weights(capture, parts)
        loss = batches.total_loss(capture, result.outputs, shares, COUNT in batch)
        return batches.join_outputs(capture, result.outputs, shares, loss)

    # ------------------------------------------------------------------- state

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters that require a gradient, for an optimizer."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """The model's `state_dict`."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Loads into the model; the next iteration uses what was loaded."""
        return self.model.load_state_dict(state, strict=strict)

    def save_checkpoint(
        self,
        folder: str | PathLike[str],
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
    ) -> None:
        """Saves everything that training depends on, once no update is in flight.

        The model's weights and buffers, the optimizer's and scheduler's state, the gradient scaler's, and
        the position of torch's random generator. A process that is killed meanwhile leaves the checkpoint
        that was there before. See `rpcompile/checkpoint.py` for the files.

        Raises:
            CheckpointError: It cannot be written; says why. What was there before is as it was.
        """
        self._updates.wait()
        checkpoint.save(folder, self._state(optimizer, scheduler))

    def load_checkpoint(
        self,
        folder: str | PathLike[str],
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
    ) -> None:
        """Loads what `save_checkpoint` saved, with any number of GPUs.

        Training then goes on as if it had not been interrupted, bit for bit in mode "sync". In mode
        "async" the next iteration uses the loaded weights.

        Raises:
            CheckpointError: It is missing or damaged, or is of another model, optimizer or scheduler;
                nothing has been changed.
        """
        self._updates.wait()
        checkpoint.load(folder, self._state(optimizer, scheduler))

    def close(self) -> None:
        """Waits for what is in flight, and ends the threads. Also done when the object is collected."""
        try:
            self._updates.close()
        finally:
            made = [self._with_outputs] if "_with_outputs" in self.__dict__ else []
            for executable in (self._training, *made, *self._evaluations.values()):
                executable.engine.close()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------- helpers

    def _check_open(self) -> None:
        if not self._updates.queue.close.alive:
            raise ExecutionError(
                f"this compiled {type(self.model).__name__} has been closed, by close() or at the end of its "
                f"`with`; make another: rpcompile.compile(model, plan=compiled.plan)"
            )

    def _check_training(self, capture: Capture) -> None:
        self._check_open()
        model_checks.check_autocast(capture)
        model_checks.check_gradients(self._module)
        model_checks.check_trainable(self._module, capture)
        model_checks.warn_of_another_mode(self.model, self._modes)

    @cached_property
    def _with_outputs(self) -> Executable:
        return self._makers.with_outputs()

    def _state(
        self, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None
    ) -> dict[str, checkpoint.Stateful]:
        parts = {"optimizer": optimizer, "scheduler": scheduler, "grad_scaler": self._options.grad_scaler}
        return {"model": self.model, **{name: part for name, part in parts.items() if part is not None}}

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        masters = self._tensors(self.program.capture)
        named = dict(self._module.named_parameters(remove_duplicate=False))
        owners = {id(named[name]): segment for name, segment in self._weights.owners().items()}
        before, after = self._weights.before_step, self._weights.after_step
        self._updates.step(optimizer, owners, lambda: before(masters), lambda: after(masters))

    def _overlap(
        self,
        tensors: Mapping[str, torch.Tensor],
        parts: list[Tensors],
        microbatches: list[Microbatch],
        pending: Mapping[int, Future[None]],
        loss_of: Callable[[Result], torch.Tensor],
    ) -> torch.Tensor:
        """Starts an iteration behind the one in flight, and hands out its loss."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        if self._updates.is_clipped(parameters.values()):
            self._updates.wait()  # not zeroed, and to be scaled before anything is added
        if (last := self._in_flight.last) is not None:
            # Buffers that the iteration before changes are there when it is over.
            changed = {name for names in self.program.states for name in names}
            changing = (s for s, names in enumerate(self.program.weights) if changed & set(names))
            pending = {**pending, **dict.fromkeys(changing, last)}
        stored = dict(self._module.named_buffers(remove_duplicate=False))
        read = [parameters[name] for name in parameters if tensors.get(name) is parameters[name]]
        with uninterrupted() as interrupt:  # nobody would wait for what is started and not added
            flight = self._training.engine.start(tensors, parts, microbatches, pending)
            try:
                interrupt.raise_if_it_came()
                return self._in_flight.add(flight, parameters, stored, read, loss_of)
            except BaseException:
                flight.cancel()
                with suppress(ExecutionError):
                    flight.result()
                raise

    def _loss_scale(self) -> float:
        scaler = self._options.grad_scaler
        return 1.0 if scaler is None else float(scaler.scale(torch.ones(())))

    def _cast(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = self._options.compute_dtype
        if dtype is None:
            return args, kwargs
        return tuple(cast_floats(value, dtype) for value in args), {
            name: cast_floats(value, dtype) for name, value in kwargs.items()
        }

    def _tensors(self, capture: Capture) -> dict[str, torch.Tensor]:
        """The model's tensors by name."""
        tensors: dict[str, torch.Tensor] = {
            **dict(self._module.named_parameters(remove_duplicate=False)),
            **dict(self._module.named_buffers(remove_duplicate=False)),
            **capture.constants,
        }
        model_checks.check_tensors(tensors, capture, self._options.compute_dtype is not None)
        return tensors

    def _commit(self, gradients: Tensors, states: Tensors) -> None:
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        stored = dict(self._module.named_buffers(remove_duplicate=False))
        with unguarded():
            if any(self._updates.guard.is_held(parameters[name].grad) for name in gradients):
                self._updates.wait()  # not zeroed since an update that is in flight, or clipped
        with uninterrupted(), torch.no_grad(), unguarded():
            for name, gradient in gradients.items():
                parameter = parameters[name]
                if not parameter.requires_grad:
                    continue  # it has been frozen
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)
            for name, value in states.items():
                stored[name].copy_(value)


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _microbatches(capture: Capture, parts: list[Tensors], scales: list[float]) -> list[Microbatch]:
    # Drawn from the default generator, so torch.manual_seed makes a run repeatable.
    seed = int(torch.randint(1 << 62, ()).item()) if capture.random else 0
    return [
        Microbatch(stream_seed(seed, index), batches.microbatch_sizes(capture, part), scale)
        for index, (part, scale) in enumerate(zip(parts, scales, strict=True))
    ]
