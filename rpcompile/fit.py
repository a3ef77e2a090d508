"""The largest microbatch, or the longest sequence, whose plan fits a GPU and the host.

The GPU's side is first estimated by the finest partition (one segment a stage), which takes no solver;
from there on sizes are planned for good, smaller ones until a plan is found and the host has room, or larger
ones as long as one is.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.mixed_gpus import Box
from rpcompile.planner import PlanOptions
from rpcompile.round_robin_time import StageCosts, stages_between
from rpcompile.units import size as in_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rpcompile.ir import Hardware, SegmentChain
    from rpcompile.plan import Plan
    from rpcompile.planner import CapturedModel

SOLVER_S = 1.0
_NO_LIMIT = 1 << 62
# Stages that a search finds may leave less on the host; what needs more than so many times what there is is
# not searched on, which takes seconds a size.
_SEARCHED = 4


@dataclass(frozen=True)
class Fit:
    """What `largest_that_fits` found.

    Attributes:
        asked: "batch" (rows of a microbatch) or "sequence".
        size: The largest that fits; 0 if not even 1 does.
        sizes: All sizes of a microbatch, `size` included.
        gpu_peak_bytes: Peak of the plan at this size, simulated; 0 without a plan.
        gpu_limit_bytes: What a plan may use of the GPU; of different ones, of the smallest.
        host_bytes: What the plan takes on the host, optimizer included.
        host_limit_bytes: What the host has.
        binds: Why a larger size does not fit.
        plan: The plan at this size; None if nothing fits.
    """

    asked: str
    size: int
    sizes: dict[str, int]
    gpu_peak_bytes: int
    gpu_limit_bytes: int
    host_bytes: int
    host_limit_bytes: int
    binds: str
    plan: Plan | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the plan by its id."""
        found = asdict(replace(self, plan=None))
        return {**found, "plan": None if self.plan is None else self.plan.id, "source": "simulated"}

    def __str__(self) -> str:
        if self.plan is None:
            return f"Not even {self.asked} 1 fits: {self.binds}\n"
        others = " · ".join(f"{name} {value}" for name, value in self.sizes.items() if name != self.asked)
        return (
            f"Largest {self.asked} of a microbatch: {self.size:,}{f'  ({others})' if others else ''}\n"
            f"GPU peak   {in_units(self.gpu_peak_bytes)} of {in_units(self.gpu_limit_bytes)} (simulated)\n"
            f"Host       {in_units(self.host_bytes)} of {in_units(self.host_limit_bytes)}, AdamW's state "
            f"included\n"
            f"Binds      {self.binds}\n"
        )


def largest_that_fits(
    captured: CapturedModel,
    hardware: Hardware | Box,
    asked: str,
    fixed: Mapping[str, int],
    *,
    gpus: int,
    microbatches: int,
    host_bytes: int,
    progress: bool | None = None,
) -> Fit:
    """Finds how large one size of a microbatch may be.

    Args:
        captured: The model.
        hardware: The GPU; or a box of as many as `gpus`, of which the smallest binds.
        asked: The size to make as large as possible: "batch" or "sequence".
        fixed: The other sizes of a microbatch.
        gpus: Number of GPUs.
        microbatches: Microbatches of a whole batch; their boundaries lie on the host.
        host_bytes: What the host has.
        progress: Show a progress bar; default: if standard error is a terminal.

    Returns:
        The size, exact up to 64 and to 1/64 of itself beyond, and what binds.

    Raises:
        InvalidArgument: The model has no such size, or another size is missing.
    """
    ranges = captured.capture.symbols
    if asked not in ranges:
        raise InvalidArgument(f"the model has no size {asked!r}; it has {', '.join(ranges) or 'none'}")
    search = _Search(captured, hardware, asked, dict(fixed), gpus, microbatches, host_bytes, {})
    with tqdm(desc="fit", delay=2.0, leave=False, disable=None if progress is None else not progress) as bar:
        search.bar = bar
        low, high = ranges[asked]
        upper = _reach(low, high, lambda size: search.finest(size) <= search.usable_bytes)
        found = _between(low, upper, lambda size: search.problem(size) is None)
        found = _beyond(search, found, high) if found >= low else 0
        binds = _why(search, found, high)
    plan = search.plans.get(found)
    return Fit(
        asked=asked,
        size=found,
        sizes={**fixed, asked: found},
        gpu_peak_bytes=0 if plan is None else max(plan.prediction.gpu_peak_bytes),
        gpu_limit_bytes=search.usable_bytes,
        host_bytes=0 if plan is None else plan.prediction.host_peak_bytes,
        host_limit_bytes=host_bytes,
        binds=binds,
        plan=plan,
    )


@contextmanager
def naming_the_longest(
    captured: CapturedModel,
    hardware: Hardware | Box,
    sizes: Mapping[str, int],
    *,
    gpus: int,
    microbatches: int,
    **divided: Any,
) -> Iterator[None]:
    """Around the planning of one size: if that is too long to fit, the error says which sequence does.

    Args:
        captured: The model.
        hardware: The GPU, or a box of them.
        sizes: Of a microbatch.
        gpus, microbatches: As planned for.
        divided: Options of `CapturedModel.bind`.

    Raises:
        PartitionError: With the longest sequence that was planned, as far as the GPU's memory goes; exact up
            to 64 tokens and to 1/64 of itself beyond.
    """
    try:
        yield
    except PartitionError as error:
        sizes = {**captured.capture.example_sizes, **sizes}
        if "sequence" not in sizes:
            raise
        size, least = sizes["sequence"], captured.capture.symbols["sequence"][0]
        fixed = {name: size for name, size in sizes.items() if name != "sequence"}
        search = _Search(captured, hardware, "sequence", fixed, gpus, microbatches, _NO_LIMIT, divided)
        if search.finest(size) <= search.usable_bytes:
            raise  # it is not for want of memory
        with tqdm(desc="longest sequence", delay=2.0, leave=False, disable=None) as search.bar:
            longest = _longest(search, size, least)
            while longest >= least and search.problem(longest) is not None:
                longest -= max(1, longest // 64)
            longest = _beyond(search, longest, size - 1) if longest >= least else 0
        found = f"The longest that fits is sequence={longest:,}" if longest else "No sequence fits"
        raise type(error)(f"{error} {found}.") from None


def _longest(search: _Search, size: int, least: int) -> int:
    """The largest size below one that does not fit that does, to 1/64 or so; 0 if none from `least` on does.

    Where nothing fits, all that can be divided is: the need is a constant and a part in proportion to the
    size, and each step, by the ratio to the limit, lands a little above what fits.
    """
    while size >= least:
        over = search.finest(size) / search.usable_bytes
        if over <= 1:
            return size
        size = min(int(size / over), size - max(1, size // 64))
    return 0


@dataclass
class _Search:
    captured: CapturedModel
    hardware: Hardware | Box
    asked: str
    fixed: dict[str, int]
    gpus: int
    microbatches: int
    host_bytes: int
    divided: Mapping[str, Any]  # `tiles` and `head_groups` of `CapturedModel.bind`

    def __post_init__(self) -> None:
        self.bar: Any = tqdm(disable=True)
        self.plans: dict[int, Plan] = {}
        self._problems: dict[int, str | None] = {}
        self._finest: dict[int, int] = {}

    @property
    def usable_bytes(self) -> int:
        """Of the smallest GPU."""
        return (self.hardware.smallest if isinstance(self.hardware, Box) else self.hardware).usable_bytes

    def chain(self, size: int) -> SegmentChain:
        self.bar.update()
        return self.captured.bind(self.hardware, {**self.fixed, self.asked: size}, **self.divided)

    def finest(self, size: int) -> int:
        """Bytes that the finest partition needs on a GPU."""
        if size in self._finest:
            return self._finest[size]
        chain = self.chain(size)
        segments = len(chain.segments)
        gpus = min(self.gpus, segments)
        costs = StageCosts(chain, gpus, self.microbatches)
        cuts = [*range(segments), *range(segments + 1, 2 * segments - chain.first_backward + 1)]
        stages = stages_between(cuts, segments)
        resident = costs.resident_bytes(cuts, [costs.of(stage) for stage in stages])
        self._finest[size] = max(resident)
        return self._finest[size]

    def problem(self, size: int) -> str | None:
        """Why no plan fits; None if one does, which `plans` then holds."""
        if size not in self._problems:
            self._problems[size] = self._plan(size)
        return self._problems[size]

    def _plan(self, size: int) -> str | None:
        chain = self.chain(size)
        gpus = self.gpus if chain.kinds else min(self.gpus, len(chain.segments))
        # Offloaded attention outputs save time and take memory: what fits with them fits without.
        options = PlanOptions(
            gpus, self.microbatches, solver_time_s=SOLVER_S, effort=None, attention="recompute"
        )
        try:
            try:
                plan = self.captured.plan(chain, options, progress=False)
            except StageTooLarge:
                raise
            except PartitionError:  # a search finds stages where the solver has not the time to
                plan = self.captured.plan(chain, replace(options, effort="fast"), progress=False)
        except PartitionError as error:
            return f"at {self.asked} {size:,} the GPU: {error}"
        needed = plan.prediction.host_peak_bytes
        if self.host_bytes < needed <= _SEARCHED * self.host_bytes:
            wanted = replace(options, effort="fast", host_bytes=self.host_bytes)
            with _quietly():
                plan = self.captured.plan(chain, wanted, progress=False)
            needed = min(needed, plan.prediction.host_peak_bytes)
        if needed > self.host_bytes:
            return (
                f"at {self.asked} {size:,} the host: weights, gradients, boundaries and AdamW's state "
                f"need {in_units(needed)} of its {in_units(self.host_bytes)}"
            )
        self.plans[size] = plan
        return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the planner's warnings: what is over a limit at one size is not what the caller asked about."""
    log = logging.getLogger("rpcompile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _why(search: _Search, found: int, high: int) -> str:
    if found == high:
        return f"nothing: {high:,} is the largest {search.asked} that the model was captured for"
    return search.problem(min(high, next_size(found))) or "the solver's time"


def _beyond(search: _Search, size: int, high: int) -> int:
    """A size that was planned, or larger ones as long as a plan is found: the finest stages take more
    memory than others where copies bind."""
    while size < high and search.problem(larger := min(high, next_size(size))) is None:
        size = larger
    return size


def next_size(size: int) -> int:
    """The next size that is tried: one more, or 1/64 more."""
    return size + max(1, size // 64)


def _reach(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """As `_between`, by doubling from `low`: sizes far beyond what fits are never tried."""
    if not fits(low):
        return low - 1
    good = low
    while good < high:
        trial = min(high, 2 * good)
        if not fits(trial):
            return _between(good, trial - 1, fits)
        good = trial
    return good


def _between(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest size from `low` to `high` that fits, to 1/64 of it; `low - 1` if none does."""
    if high < low:
        return low - 1
    if fits(high):
        return high
    if not fits(low):
        return low - 1
    while next_size(low) < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
