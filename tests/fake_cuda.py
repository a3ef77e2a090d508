"""Stands in for `torch.cuda` under `CudaStreams`: a device that runs what is enqueued as late as it may.

As on a GPU, an operator gets its memory when it is enqueued and runs later, when its stream comes to it, on
what is in memory by then. Which stream goes on next is chosen by the test. Memory that is given back is
overwritten by the stream that allocated it, as soon as that stream comes to it: another tensor of that stream
would be there. A read that no event protects therefore meets NaN, -1 or old numbers.

Reading a tensor's content on the host would make the host wait for the device, and is an error here; so
is a wait for an event that has not been recorded, which CUDA takes for no wait at all.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_aten = torch.ops.aten
_HOST_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_EMPTY = ("aten::empty", "aten::new_empty")


class Memory:
    """Memory whose holders are told from those who only know its address, as a device's queue does."""

    def __init__(self) -> None:
        self._known: dict[int, np.ndarray[Any, Any]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that somebody holds."""
        return sum(memory.nbytes for memory in list(self._known.values()))

    def allocate(self, nbytes: int, freed: Callable[[np.ndarray[Any, Any]], object]) -> torch.Tensor:
        """A flat tensor full of NaN; `freed` is called when its last holder lets go."""
        memory = np.full(max(nbytes, 1), 0xFF, np.uint8)
        handle = memory[:nbytes]
        address = memory.ctypes.data
        self._known[address] = memory

        def free() -> None:
            if self._known.get(address) is memory:
                del self._known[address]
            freed(memory)

        weakref.finalize(handle, free).atexit = False
        return torch.from_numpy(handle)  # not a view of it, which would count as another holder

    def host(self, nbytes: int, pin: bool) -> torch.Tensor:
        """As `rpcompile.runtime.host_slots.allocate`; what is freed is overwritten at once."""
        return self.allocate(nbytes, lambda memory: memory.fill(0xFF))

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, without keeping it from being freed."""
        known = self._known.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return tensor.detach()
        flat = torch.empty(0, dtype=tensor.dtype)
        storage = torch.from_numpy(known).untyped_storage()
        return flat.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


MEMORY = Memory()


class Driver:
    """A device with any number of streams; one for all logical GPUs of a test.

    Args:
        seed: Chooses which stream goes on; odd ones give each stream a fixed priority.
        gpus: Nothing runs before so many threads wait for the device, unless `eager`.
        eager: How often the device does something while threads are still enqueuing.
        first: Name of a stream that goes on whenever it can.
        last: Name of a stream that goes on only when no other can.

    Attributes:
        stuck: Whether the device does nothing any more.
        broken: What every call that asks for the device's progress raises.
        operators_left: Out of memory when so many operators have been enqueued.
    """

    def __init__(
        self, seed: int = 0, gpus: int = 1, eager: float = 0.0, first: object = None, last: object = None
    ) -> None:
        self.stuck = False
        self.broken: Exception | None = None
        self.operators_left: int | None = None
        self.lock = threading.RLock()
        self._streams: list[Stream] = []
        self._choices = random.Random(seed)
        self._by_priority = bool(seed % 2)
        self._gpus, self._eager = gpus, eager
        self._first, self._last = first, last
        self._waiting: set[int] = set()
        self._devices = threading.local()

    # ------------------------------------------------------------- what CudaStreams uses of torch.cuda

    def Stream(self, device: Any) -> Stream:  # noqa: N802
        with self.lock:
            self._streams.append(Stream(self, device, self._choices.random()))
            return self._streams[-1]

    def Event(self, enable_timing: bool = False) -> Event:  # noqa: N802
        return Event(self, enable_timing)

    def set_device(self, device: Any) -> None:
        self._devices.current = device

    @contextmanager
    def stream(self, chosen: Stream) -> Iterator[None]:
        assert self._devices.__dict__.get("current", chosen.device) == chosen.device
        with _Enqueue(self, chosen):
            yield
        if self._choices.random() < self._eager:
            self.advance(self._choices.randrange(30))

    # ------------------------------------------------------------- the device

    @property
    def idle(self) -> bool:
        """Whether everything that was enqueued is over; what overwrites freed memory does not count."""
        return not any(
            isinstance(entry, _Kernel | Record | tuple)
            for stream in self._streams
            for entry in stream.entries
        )

    def advance(self, most: int | None = None) -> None:
        """Runs up to `most` entries of the queues, or all there are.

        Any thread may be the one to do it, and oneDNN's sums depend on how many threads theirs has.
        """
        torch.set_num_threads(1)
        with self.lock:
            while most is None or most > 0:
                ready = [stream for stream in self._streams if stream.ready()]
                if not ready:
                    return
                self._choose(ready).run()
                most = None if most is None else most - 1

    def count_operator(self) -> None:
        with self.lock:
            if self.operators_left is not None:
                self.operators_left -= 1
                if self.operators_left < 0:
                    self.operators_left = None
                    raise torch.OutOfMemoryError("simulated")

    def poll(self) -> None:
        """The calling thread waits: it has enqueued all it had, or is the host's, which enqueues nothing."""
        with self.lock:
            if not threading.current_thread().name.endswith("-host"):
                self._waiting.add(threading.get_ident())
            if len(self._waiting) >= self._gpus and not self.stuck:
                self.advance(self._choices.randrange(200))
                if self.idle:
                    self._waiting.clear()
            if self.broken is not None:
                raise self.broken

    def _choose(self, ready: list[Stream]) -> Stream:
        for stream in ready:
            if self._first is not None and stream.name == self._first:
                return stream
        others = [stream for stream in ready if self._last is None or stream.name != self._last] or ready
        return max(others, key=lambda s: s.priority) if self._by_priority else self._choices.choice(others)


class Record:
    """One recording of an event."""

    def __init__(self) -> None:
        self.done = False


class Stream:
    """A queue of what its operators do, of recordings and of waits."""

    def __init__(self, driver: Driver, device: Any, priority: float) -> None:
        self.driver = driver
        self.device = device
        self.priority = priority
        self.name: object = None
        self.deaf = False
        self.entries: deque[Record | tuple[Record] | Callable[[], object]] = deque()

    def put(self, entry: Record | tuple[Record] | Callable[[], object]) -> None:
        with self.driver.lock:
            self.entries.append(entry)

    def wait_event(self, event: Event) -> None:
        assert event.latest is not None, "CUDA would not wait for an event that has not been recorded"
        if not self.deaf:
            self.put((event.latest,))

    def ready(self) -> bool:
        if not self.entries:
            return False
        head = self.entries[0]
        return not isinstance(head, tuple) or head[0].done

    def run(self) -> None:
        entry = self.entries.popleft()
        if isinstance(entry, Record):
            entry.done = True
        elif not isinstance(entry, tuple):
            try:
                entry()
            except Exception as error:  # reported by the next call that waits, as CUDA does
                self.driver.broken = self.driver.broken or error


class Event:
    """What is waited for is its last recording before the wait."""

    def __init__(self, driver: Driver, timing: bool) -> None:
        self._driver = driver
        self._timing = timing
        self.latest: Record | None = None

    def record(self, stream: Stream) -> None:
        self.latest = Record()
        stream.put(self.latest)

    def query(self) -> bool:
        self._driver.poll()
        return self.latest is None or self.latest.done

    def elapsed_time(self, other: Event) -> float:
        for event in (self, other):
            assert event._timing
            assert event.latest is not None
            assert event.latest.done, "CUDA knows no time of an event that has not happened"
        return 1.0


class _Enqueue(TorchDispatchMode):
    """Gives each operator's results memory, and puts the operator into a stream."""

    def __init__(self, driver: Driver, stream: Stream) -> None:
        super().__init__()
        self._driver, self._stream = driver, stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func not in _HOST_READS, f"the host would wait for the device: {func}"
        if kwargs.get("device") == torch.device("meta") or _is_view(func):
            return func(*args, **kwargs)
        shapes = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        results = [shapes] if isinstance(shapes, torch.Tensor) else list(shapes or ())
        given = _written(func, args, kwargs)
        made = [
            given[index] if index in given else self._empty_like(value) for index, value in enumerate(results)
        ]
        self._driver.count_operator()
        if not func._schema.name.startswith(_EMPTY):
            shadow = MEMORY.shadow
            self._stream.put(
                _Kernel(
                    func,
                    tree_map(lambda a: shadow(a) if isinstance(a, torch.Tensor) else a, args),
                    tree_map(lambda a: shadow(a) if isinstance(a, torch.Tensor) else a, kwargs),
                    [
                        shadow(value) if isinstance(value, torch.Tensor) and index not in given else None
                        for index, value in enumerate(made)
                    ],
                )
            )
        if isinstance(shapes, torch.Tensor):
            return made[0]
        return None if shapes is None else type(shapes)(made)

    def _empty_like(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        stream = self._stream
        elements = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)) + 1
        flat = MEMORY.allocate(
            elements * value.element_size(), lambda memory: stream.put(lambda: memory.fill(0xFF))
        )
        return torch.empty(0, dtype=value.dtype).set_(flat.untyped_storage(), 0, value.shape, value.stride())


class _Kernel:
    """An operator with the addresses it works on, and the random numbers it will draw."""

    def __init__(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: list[torch.Tensor | None]
    ) -> None:
        self._func, self._args, self._kwargs, self._results = func, args, kwargs, results
        random = torch.Tag.nondeterministic_seeded in func.tags
        self._state = torch.default_generator.get_state() if random else None

    def __call__(self) -> None:
        drawing = nullcontext() if self._state is None else torch.random.fork_rng(devices=())
        with torch.no_grad(), drawing:
            if self._state is not None:
                torch.default_generator.set_state(self._state)
            found = self._func(*self._args, **self._kwargs)
        found = [found] if isinstance(found, torch.Tensor) else list(found or ())
        for target, value in zip(self._results, found, strict=True):
            if target is not None and value is not None:
                target.copy_(value)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
    """Result -> the argument that it is."""
    by_alias: dict[str, Any] = {}
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            by_alias[str(argument.alias_info.before_set)] = value
    return {
        index: by_alias[str(value.alias_info.before_set)]
        for index, value in enumerate(func._schema.returns)
        if value.alias_info is not None
    }


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
