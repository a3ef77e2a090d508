"""nn.Module -> Capture: the model's training graph through torch.export."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module

from rpcompile.errors import InvalidArgument, MissingExampleInputs, RpcompileError, UnsupportedModel
from rpcompile.export_guards import capture_error, no_host_random, no_tracebacks, plain_autograd
from rpcompile.exporting import EXPORT_LOCK, deferred_code, renumber_nodes, share_sizes
from rpcompile.huggingface import capture_context, idle_mask_notice
from rpcompile.ir import Capture, InputSpec, TensorSpec
from rpcompile.repeated_blocks import Interference, repeated_blocks

MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class ExampleInputs:
    """Positional and keyword tensors of one microbatch, as the model's forward takes them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: object) -> ExampleInputs:
        """A mapping means keywords, a tuple or list positions, a tensor the only argument."""
        if isinstance(example, Mapping):
            result = cls((), {str(key): value for key, value in example.items()})
        elif isinstance(example, tuple | list):
            result = cls(tuple(example), {})
        elif isinstance(example, torch.Tensor):
            result = cls((example,), {})
        else:
            result = cls((), {})
        for name, value in result.named().items():
            if not isinstance(value, torch.Tensor):
                raise InvalidArgument(
                    f"example_inputs[{name!r}] is a {type(value).__name__}; every input must be a tensor. "
                    f"Wrap the model in a module whose forward passes {name}={value!r} on"
                )
        if result.args or result.kwargs:
            return result
        raise MissingExampleInputs(
            f"example_inputs holds no tensor (it is a {type(example).__name__}); give a dict of "
            f"keyword tensors, a tuple of positional tensors, or one tensor"
        )

    def named(self) -> dict[str, Any]:
        """Name (position as text, or keyword) -> value."""
        return {**{str(index): value for index, value in enumerate(self.args)}, **self.kwargs}


@dataclass(frozen=True)
class CaptureGraph:
    """Captures a module as it stands: its training flag, its requires_grad, its dtypes.

    Options:
        example: Tensors of one microbatch. Only shapes and dtypes matter.
        compute_dtype: What trainable parameters are taken to be of, whatever they are; None for their own.
        repeat_blocks: Trace each distinct block (decoder layer) once and copy its nodes for the
            blocks that are proved to be the same. The graph is the same; it only takes less time.
    """

    example: ExampleInputs
    repeat_blocks: bool = True
    compute_dtype: torch.dtype | None = None
    name = "capture-graph"

    def run(self, model: torch.nn.Module) -> Capture:
        """Captures `model`; nothing is computed, and weights may be on the meta device.

        Under the caller's autocast it is captured as it runs there: the graph holds no casts, and
        each stage is to run under the same one.

        Raises:
            CaptureError: torch.export cannot trace it; names operator and place.
            UnsupportedModel: The graph has no scalar loss first, changes an input, calls an
                autograd.Function, or assigns a buffer of another shape; there are hooks on gradients; the
                forward draws random numbers outside of torch.
        """
        named = self.example.named()
        symbols = symbol_dims(named)
        autocast = _callers_autocast()
        for tensor in model.parameters():
            tensor.detach()  # waits for an update in flight, which may need the lock
        with (
            EXPORT_LOCK,
            capture_context(model, frozenset(named)),
            plain_autograd(model),
            no_host_random(model),
            no_tracebacks(),
            _on_cpu(model, self.compute_dtype) as mode,
            torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False),
        ):
            exported = self._export(model, named, symbols, mode)
            return _to_capture(model, exported, symbols, named, autocast)

    def _export(
        self,
        model: torch.nn.Module,
        named: dict[str, torch.Tensor],
        symbols: dict[str, dict[int, str]],
        mode: FakeTensorMode | None,
    ) -> torch.export.ExportedProgram:
        """Exports once; again with narrower ranges, or in full where copied blocks may be why it failed."""
        entry = _Entry(model, list(named), len(self.example.args))
        ranges: dict[str, tuple[int, int] | None] = {
            name: (1, MAX_SIZE) for dims in symbols.values() for name in dims.values()
        }
        repeat = self.repeat_blocks
        while True:
            shapes = [_dynamic(symbols.get(key, {}), ranges) for key in named]
            values = [
                _stand_in(value, shape or {}) for value, shape in zip(named.values(), shapes, strict=True)
            ]
            if mode is not None:
                values = [mode.from_tensor(value) for value in values]
            kwargs = dict(zip(entry.names, values, strict=True))
            dynamic = dict(zip(entry.names, shapes, strict=True))
            interference = Interference()
            try:
                with ExitStack() as stack:
                    if repeat:
                        interference = stack.enter_context(repeated_blocks(model))
                        stack.enter_context(deferred_code())
                    exported = torch.export.export(entry, (), kwargs, dynamic_shapes=dynamic, strict=False)
            except RpcompileError:
                raise
            except Exception as error:
                refined = _refine(error, ranges)
                if refined == ranges:
                    if not interference.possible:
                        raise capture_error(model, error, self.example.args, self.example.kwargs) from error
                    repeat = False
                ranges = refined
            else:
                share_sizes(exported.graph)
                renumber_nodes(exported.graph_module)
                exported.graph_module.recompile()
                return exported


@contextmanager
def _on_cpu(model: torch.nn.Module, compute_dtype: torch.dtype | None) -> Iterator[FakeTensorMode | None]:
    """Stands fake CPU tensors in for meta ones, and for parameters that will be cast.

    Layouts, and with them the graph, depend on the device. A plan made without weights thus holds
    with them, where weights are on the host. Yields the fake mode, None where nothing stands in.
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if compute_dtype is None and not any(tensor.device.type == "meta" for tensor in named.values()):
        yield None
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stand_ins: dict[int, torch.Tensor] = {}
    with mode:
        for tensor in named.values():
            cast = tensor.requires_grad and tensor.dtype.is_floating_point
            dtype = compute_dtype if compute_dtype is not None and cast else tensor.dtype
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            stand_ins.setdefault(id(tensor), fake)
    with _reparametrize_module(model, {name: stand_ins[id(tensor)] for name, tensor in named.items()}):
        yield mode


def _callers_autocast() -> torch.dtype | None:
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


class _Entry(torch.nn.Module):
    """Calls the model with keywords only, under a signature that names exactly these.

    torch.export mixes up dynamic shapes and inputs when a forward takes **kwargs.
    """

    PREFIX = "inner."

    def __init__(self, model: torch.nn.Module, inputs: list[str], positional: int) -> None:
        super().__init__()
        self.inner = model
        parameters = inspect.signature(model.forward).parameters.values()
        own = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own += [f"input{index}" for index in range(len(own), positional)]
        self.names = [*own[:positional], *inputs[positional:]]

        def forward(**named: torch.Tensor) -> Any:
            values = list(named.values())
            keywords = dict(zip(inputs[positional:], values[positional:], strict=True))
            with _assigned_buffers_copied(model):
                return model(*values[:positional], **keywords)

        kind = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in self.names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


@contextmanager
def _assigned_buffers_copied(model: torch.nn.Module) -> Iterator[None]:
    """Turns `self.buffer = value` into a copy into the buffer, at the end; torch.export would drop it.

    Raises:
        UnsupportedModel: The new value has another shape or dtype.
    """
    before = [(path, module, dict(module._buffers)) for path, module in model.named_modules()]
    yield
    for path, module, buffers in before:
        for name, old in buffers.items():
            new = module._buffers.get(name)
            if new is old:
                continue
            where = f"{path}.{name}".removeprefix(".")
            if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
                raise UnsupportedModel(
                    f"{type(model).__name__} assigns {_form(new)} to its buffer {where!r}, which was "
                    f"{_form(old)}; keep shape and dtype, or keep it out of register_buffer"
                )
            module._buffers[name] = old
            old.copy_(new.detach())


def _form(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{_dtype(tensor)} of shape {tuple(tensor.shape)}"


def symbol_dims(named: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """Which dimensions of which inputs are "batch", "sequence" and "target_sequence".

    Dimension 0 of every tensor is the batch if they agree on its size (a tensor of another size
    there is passed whole). Dimension 1 of integer tensors of rank 2 that agree is the sequence;
    labels and inputs of a decoder may agree on another length.
    """
    sizes = [value.shape[0] for value in named.values() if value.ndim]
    result: dict[str, dict[int, str]] = {}
    if not sizes:
        return result
    batch = max(set(sizes), key=lambda size: (sizes.count(size), -sizes.index(size)))
    lengths: dict[int, str] = {}
    tokens = {
        key: value.shape[1]
        for key, value in named.items()
        if value.ndim == 2 and value.shape[0] == batch and not value.dtype.is_floating_point
    }
    for key in sorted(tokens, key=_is_target):
        if not lengths:
            lengths[tokens[key]] = "sequence"
        elif len(lengths) == 1 and _is_target(key):
            lengths.setdefault(tokens[key], "target_sequence")
    for key, value in named.items():
        if value.ndim and value.shape[0] == batch:
            result[key] = {0: "batch"}
            if (key in tokens or _is_vectors(value)) and value.shape[1] in lengths:
                result[key][1] = lengths[value.shape[1]]
        elif value.ndim == 3 and value.shape[1] == batch and value.shape[2] in lengths:
            result[key] = {1: "batch", 2: lengths[value.shape[2]]}
    return result


def _is_vectors(value: torch.Tensor) -> bool:
    """Whether it may be one vector a token (inputs_embeds)."""
    return value.ndim == 3 and value.dtype.is_floating_point


def _is_target(key: str) -> bool:
    return key == "labels" or key.startswith("decoder_")


def _stand_in(value: torch.Tensor, dynamic: Mapping[int, Any]) -> torch.Tensor:
    # Export specialises on sizes 0 and 1, and merges inputs that are the same object.
    shape = [max(2, size) if index in dynamic else size for index, size in enumerate(value.shape)]
    return torch.zeros(shape, dtype=value.dtype)


def _dynamic(dims: dict[int, str], ranges: dict[str, tuple[int, int] | None]) -> dict[int, Any] | None:
    shape: dict[int, Any] = {}
    for index, name in dims.items():
        bounds = ranges[name]
        if bounds is not None:
            shape[index] = torch.export.Dim(name, min=bounds[0], max=bounds[1])
    return shape or None


def _refine(error: Exception, ranges: dict[str, tuple[int, int] | None]) -> dict[str, tuple[int, int] | None]:
    """Narrows the ranges as the error's "Suggested fixes" say; None stands for the example's size."""
    result = dict(ranges)
    _, _, fixes = str(error).partition("Suggested fixes:")
    for name, value in re.findall(r"^\s*(\w+) = (.+?)\s*$", fixes, re.MULTILINE):
        bounds = result.get(name)
        if bounds is None:
            continue
        if value.isdigit():
            result[name] = None
        elif not value.startswith("Dim("):
            result[name] = None  # a multiple of something, which no range can say
        else:
            limits = {key: int(number) for key, number in re.findall(r"(min|max)=(\d+)", value)}
            result[name] = (limits.get("min", bounds[0]), limits.get("max", bounds[1]))
    if result == ranges:
        violated = re.search(r"Constraints violated \(([\w, ]+)\)", str(error))
        result.update(dict.fromkeys(set(violated[1].split(", ")) & result.keys() if violated else ()))
    return result


# ------------------------------------------------------------------- ExportedProgram -> Capture


def _to_capture(
    model: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    symbols: dict[str, dict[int, str]],
    named: Mapping[str, Any],
    autocast: torch.dtype | None,
) -> Capture:
    signature = exported.graph_signature
    _strip_entry(exported.graph_module)
    for output in signature.output_specs:
        if output.kind is OutputKind.USER_INPUT_MUTATION:
            raise UnsupportedModel(
                f"{type(model).__name__} changes its input {output.target!r} in place; clone it in forward"
            )
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    aliases = _aliases(model)
    parameters: list[TensorSpec] = []
    buffers: list[TensorSpec] = []
    constants: dict[str, torch.Tensor] = {}
    user: list[str] = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            user.append(name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = str(spec.target).removeprefix(_Entry.PREFIX)
            tensor = placeholders[name].meta["val"]
            trainable = spec.kind is InputKind.PARAMETER and bool(tensor.requires_grad)
            names = aliases.get(target, (target,))
            entry = TensorSpec(
                name, names[0], names, tuple(tensor.shape), _dtype(tensor), _nbytes(tensor), trainable
            )
            (parameters if spec.kind is InputKind.PARAMETER else buffers).append(entry)
            if spec.kind is InputKind.CONSTANT_TENSOR:
                constant = exported.constants[str(spec.target)]
                assert isinstance(constant, torch.Tensor)
                constants[names[0]] = constant
        else:
            raise UnsupportedModel(f"{type(model).__name__} has an input of kind {spec.kind.name}: {name}")
    inputs, ranges, symbol_text = _inputs(user, placeholders, list(named), symbols, exported)
    sizes = {
        symbol: named[key].shape[dim]
        for key, dims in symbols.items()
        for dim, symbol in dims.items()
        if symbol in ranges
    }
    module = exported.graph_module
    module.meta["symbols"] = symbol_text
    outputs = _outputs(model, module)
    return Capture(
        graph_module=module,
        model_name=type(model).__name__,
        parameters=tuple(parameters),
        buffers=tuple(buffers),
        constants=constants,
        inputs=inputs,
        outputs=outputs,
        symbols=ranges,
        example_sizes=sizes,
        tied=tuple(sorted({spec.aliases for spec in parameters if len(spec.aliases) > 1})),
        mutations={},
        fingerprint=_fingerprint(parameters, buffers, inputs, module.graph, autocast),
        output_spec=exported.call_spec.out_spec,
        autocast=autocast,
        notices=(*_fixed_sizes(model, named, symbols, ranges), *idle_mask_notice(model, named)),
    )


def _fixed_sizes(
    model: torch.nn.Module,
    named: Mapping[str, torch.Tensor],
    symbols: dict[str, dict[int, str]],
    ranges: Mapping[str, tuple[int, int]],
) -> Iterator[str]:
    wanted = {name: (key, dim) for key, dims in symbols.items() for dim, name in dims.items()}
    for name, (key, dim) in wanted.items():
        if name not in ranges:
            size = named[key].shape[dim]
            yield (
                f"the {name} of {type(model).__name__} is fixed at {size}, as in the example: its forward "
                f"depends on the number (a loop over it, or a shape that fits only some sizes). Batches of "
                f"another {name} need a capture of their own"
            )


def _strip_entry(module: torch.fx.GraphModule) -> None:
    """Makes module paths those of the model itself."""
    for graph_module in module.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, torch.fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack", {})
            node.meta["nn_module_stack"] = {
                key: ((path + ".").removeprefix(_Entry.PREFIX).removesuffix("."), kind)
                for key, (path, kind) in stack.items()
            }


def _inputs(
    user: list[str],
    placeholders: dict[str, torch.fx.Node],
    keys: list[str],
    symbols: dict[str, dict[int, str]],
    exported: torch.export.ExportedProgram,
) -> tuple[tuple[InputSpec, ...], dict[str, tuple[int, int]], dict[str, str]]:
    specs: list[InputSpec] = []
    ranges: dict[str, tuple[int, int]] = {}
    symbol_text: dict[str, str] = {}
    for placeholder, key in zip(user, keys, strict=True):
        value = placeholders[placeholder].meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        shape: list[int | str] = []
        for dim, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            symbol = size.node.expr
            name = symbols.get(key, {}).get(dim, str(symbol))
            bounds = exported.range_constraints.get(symbol)
            upper = MAX_SIZE if bounds is None else min(MAX_SIZE, int(bounds.upper))
            ranges[name] = (1 if bounds is None else max(1, int(bounds.lower)), upper)
            symbol_text[name] = str(symbol)
            shape.append(name)
        batch_dim = next((dim for dim, name in symbols.get(key, {}).items() if name == "batch"), None)
        specs.append(InputSpec(placeholder, key, tuple(shape), _dtype(value), batch_dim))
    return tuple(specs), ranges, symbol_text


def _outputs(model: torch.nn.Module, module: torch.fx.GraphModule) -> tuple[str, ...]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = [value for value in output.args[0] if value is not None]
    first = returned[0] if returned else None
    value = first.meta.get("val") if isinstance(first, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 0:
        got = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "that is no tensor"
        raise UnsupportedModel(
            f"{type(model).__name__}'s first output must be the loss, a scalar tensor; it is one {got}. "
            f"Return the loss first (Hugging Face models do when labels are passed)."
        )
    return tuple(node.name for node in returned if isinstance(node, torch.fx.Node))


def _aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()


def _fingerprint(
    parameters: list[TensorSpec],
    buffers: list[TensorSpec],
    inputs: tuple[InputSpec, ...],
    graph: torch.fx.Graph,
    autocast: torch.dtype | None,
) -> str:
    digest = hashlib.sha256(str(autocast).encode() if autocast else b"")
    for spec in (*parameters, *buffers):
        digest.update(repr((spec.name, spec.shape, spec.dtype, spec.trainable)).encode())
    digest.update(repr([(spec.name, spec.dtype, len(spec.shape)) for spec in inputs]).encode())
    for node in graph.nodes:
        if node.op == "call_function":
            digest.update(f"{node.name}|{node.target}|{node.args}|{node.kwargs}".encode())
    return digest.hexdigest()
