"""The plan: everything decided before training, to print, check, save and reuse.

The file is JSON, made and read by msgspec against these types; nothing in it is executed. Its
schema is `rpcompile/data/plan.schema.json`, written by `python -m rpcompile.plan`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rpcompile.action_table import ActionTable, schedule_table
from rpcompile.collection import collection_paused
from rpcompile.errors import PlanFileError, RpcompileError, ScheduleError
from rpcompile.files import write_in_one_step
from rpcompile.host_memory import HostMemory
from rpcompile.ir import Partition, Schedule, SegmentChain
from rpcompile.plan_checks import plan_problem
from rpcompile.plan_text import plan_text
from rpcompile.plan_versions import SCHEDULED_SINCE, VERSION, known, upgrade
from rpcompile.shared_links import SharedLinks
from rpcompile.simulate import Timeline, simulate, simulate_steady
from rpcompile.trace import write_trace
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rpcompile.explain import Explanation

_TRACED = 4  # iterations of an asynchronous plan that a trace shows


@dataclass(frozen=True)
class Prediction:
    """What the simulator says about one iteration of a schedule.

    Attributes:
        iteration_s: Makespan; in mode "async" or with updates the period, which each of many iterations takes
            that follow one another without a pause.
        tokens_per_s: Tokens of all microbatches over `iteration_s`; None where there are no tokens.
        bubble: Share of the GPUs' compute time that is idle, of the period where there is one.
        gpu_peak_bytes: Peak memory of each GPU.
        host_peak_bytes: Peak memory of the host.
        host: What it is made of; None where that is not known.
        traffic: Weights uploaded, in units of `stage_bytes.upload_unit_bytes`; None where that is not known.
        alone_s: Where `iteration_s` is a period, the makespan of an iteration that nothing precedes or
            follows; else None.
    """

    iteration_s: float
    tokens_per_s: float | None
    bubble: float
    gpu_peak_bytes: tuple[int, ...]
    host_peak_bytes: int
    host: HostMemory | None = None
    traffic: float | None = None
    alone_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `rpcompile.compile` decided for one model, hardware and batch size.

    Attributes:
        model_name: Class of the model.
        fingerprint: Hash of its parameters' names, shapes, dtypes and of its graph.
        dtype: Of most parameters.
        gpus: Number of GPUs.
        microbatches: Parts that each batch is split into.
        mode: "sync", "async", or "forward" for evaluation.
        chain: The segments and their prices.
        partition: The stages.
        schedule: What every stream does.
        prediction: What the simulator says about it.
        provenance: Versions that made it, and the limits that it was told to keep to.
        links: What its transfers and host work share; None for an idle machine, where nothing is shared.
        attention: What was found when it was decided whether to offload attention outputs, in a sentence.
        update_s_per_byte: What the optimizer takes on the host for each byte of gradient; 0 where updates are
            no part of the schedule.
    """

    model_name: str
    fingerprint: str
    dtype: str
    gpus: int
    microbatches: int
    mode: str
    chain: SegmentChain
    partition: Partition
    schedule: Schedule
    prediction: Prediction
    provenance: dict[str, str]
    links: SharedLinks | None = None
    attention: str = ""
    update_s_per_byte: float = 0.0

    @property
    def chained(self) -> bool:
        """Whether the predicted time is that of iterations that follow one another."""
        return self.mode == "async" or self.update_s_per_byte > 0

    @property
    def id(self) -> str:
        """Eight hex digits of the content; how long the solver took is left out."""
        content = replace(self, partition=replace(self.partition, solve_s=0.0), provenance={})
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:8]

    def simulate(self) -> Timeline:
        """The timeline of one iteration, which nothing precedes or follows."""
        return simulate(self.schedule, links=self.links)

    def simulate_steady(self) -> Timeline:
        """The timeline of iterations that follow one another until each takes as long as the next."""
        return simulate_steady(self.schedule, self.links)

    def actions(self) -> ActionTable:
        """What each GPU computes and when, as plain data."""
        return schedule_table(self.partition, self.schedule, self.simulate())

    def verify(self) -> None:
        """Proves that the schedule is complete, ordered, free of deadlocks and within memory.

        Raises:
            ScheduleError: Naming the action and the property that fails.
        """
        verify_schedule(self.schedule, self.chain, self.partition)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, all or nothing.

        Raises:
            PlanFileError: The file cannot be written.
        """
        target = Path(path)
        file = _PlanFile("rpcompile.plan", VERSION, self, self.actions())
        data = msgspec.json.encode(file, order="sorted")
        try:
            write_in_one_step(target, data)
        except OSError as error:
            raise PlanFileError(f"{target}: cannot write the plan: {error.strerror}") from error

    @staticmethod
    def load(path: str | os.PathLike[str], *, verify: bool = True) -> Plan:
        """Reads a plan that `save` wrote, also one of an older version.

        Args:
            path: The file.
            verify: Prove the schedule, too, which takes far longer than reading; numbers and references
                are always checked. Only look at a plan that was read without, never run it.

        Raises:
            PlanFileError: The file is missing, is no plan, is newer than this version reads, or is damaged;
                says where.
        """
        source = Path(path)
        try:
            data = source.read_bytes()
        except OSError as error:
            raise PlanFileError(f"{source}: cannot read the plan: {error.strerror}") from error
        return _decode(source, data, verify)

    def explain(self) -> Explanation:
        """Why these stages, what bounds each, and what would help next; print it. Takes some seconds."""
        # The explanation plans again, and the planner makes plans.
        from rpcompile.explain import explain

        return explain(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the simulated timeline with matplotlib; notebooks show what it returns.

        Args:
            path: A .png, .svg or .pdf file to write, too.

        Raises:
            InvalidArgument: The file has another ending.
        """
        from rpcompile.plot import plot  # matplotlib takes a second to import

        return plot(self, path)

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the simulated timeline for ui.perfetto.dev, of several iterations if these are chained."""
        timeline = self.simulate()
        if self.chained:
            timeline = simulate(self.schedule, links=self.links, iterations=_TRACED)
        write_trace(self.schedule, timeline, Path(path))

    def __str__(self) -> str:
        return plan_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the printed form, and the timeline as a picture."""
        picture = io.BytesIO()
        figure: Any = self.plot()
        figure.savefig(picture, format="png", dpi=110)
        data = base64.b64encode(picture.getvalue()).decode()
        return f'<pre>{html.escape(str(self))}</pre><img alt="timeline" src="data:image/png;base64,{data}">'


class _PlanFile(msgspec.Struct, forbid_unknown_fields=True):
    """`actions` is for readers of the file: it follows from the plan, and loading leaves it aside."""

    format: Literal["rpcompile.plan"]
    version: int
    plan: Plan
    actions: ActionTable | None = None


class _Header(msgspec.Struct):
    format: str
    version: int


# ------------------------------------------------------------------- the file


def _decode(source: Path, data: bytes, verify: bool) -> Plan:
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanFileError(f"{source} is no plan file: {error}") from error
    if header.format != "rpcompile.plan":
        raise PlanFileError(
            f"{source} is no plan file: its format is {header.format!r}, not 'rpcompile.plan'"
        )
    if not known(header.version):
        what = "a newer rpcompile" if header.version > VERSION else "an unknown rpcompile"
        raise PlanFileError(
            f"{source} was made by {what}: its version is {header.version}, this one reads {VERSION}"
        )
    try:
        with collection_paused():
            plan = _read(data, header.version)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, PlanFileError) as error:
        raise PlanFileError(f"{source} is damaged: {error}") from error
    problem = plan_problem(plan)
    if problem is not None:
        raise PlanFileError(f"{source} is damaged: {problem}")
    if header.version < SCHEDULED_SINCE:
        plan = _scheduled_again(source, plan)
    if not verify:
        return plan
    try:
        plan.verify()
    except ScheduleError as error:
        raise PlanFileError(f"{source} is damaged: its schedule does not hold: {error}") from error
    return plan


def _read(data: bytes, version: int) -> Plan:
    if version == VERSION:
        return msgspec.json.decode(data, type=_PlanFile).plan
    file = msgspec.json.decode(data, type=dict[str, Any])
    return msgspec.convert(
        {**file, "version": VERSION, "plan": upgrade(file.get("plan"), version)}, _PlanFile
    ).plan


def _scheduled_again(source: Path, plan: Plan) -> Plan:
    """The plan with a schedule as they are made now, of the same jobs in the same order."""
    from rpcompile.chain_planner import laid_out_again  # which makes plans

    try:
        return laid_out_again(plan)
    except RpcompileError as error:
        raise PlanFileError(f"{source} is damaged: its schedule cannot be laid out again: {error}") from error


def schema() -> bytes:
    """The JSON Schema of a plan file."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(_PlanFile), order="sorted")) + b"\n"


if __name__ == "__main__":
    (Path(__file__).parent / "data" / "plan.schema.json").write_bytes(schema())
