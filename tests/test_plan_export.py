"""Exports: Python that replays the schedule, and action tables that torch's pipeline runtime takes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import _PipelineStageBase

from rpcompile.errors import InvalidArgument
from rpcompile.files import write_in_one_step
from rpcompile.plan import Plan
from rpcompile.plan_export import actions_csv, schedule_python
from rpcompile.policies import under_policy
from rpcompile.simulate import simulate
from tests.chains import chain, partition
from tests.test_plan import plan_of

GPUS, MICROBATCHES = 2, 4


def of_policy(policy: str) -> Plan:
    plan = plan_of((chain(8), partition("F0-6", "FB7-7", "B0-6"), GPUS, MICROBATCHES, "sync"))
    return under_policy(plan, policy)


class Stage(_PipelineStageBase):
    """As much of a stage as torch's schedules look at when they read a table."""

    def __init__(self, index: int, count: int) -> None:
        self.stage_index, self.num_stages = index, count
        self.group_size, self.group_rank = GPUS, 0
        self.has_backward = True
        self.submod = None
        self.stage_index_to_group_rank = {}

    def _create_grad_recv_info(self, act_send_info: Any) -> tuple[Any, ...]:
        return ()

    def _prepare_forward_infra(self, *_: Any) -> tuple[Any, ...]:
        return ()

    def _prepare_backward_infra(self, *_: Any) -> tuple[Any, ...]:
        return ()


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("gpipe", ["0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3", "1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3"]),
        ("1f1b", ["0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3", "1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3"]),
        ("interleaved_1f1b", None),
        ("looped_bfs", None),
    ],
)
def test_torch_loads_the_table(policy: str, rows: list[str] | None, tmp_path: Path) -> None:
    plan = of_policy(policy)
    text = actions_csv(plan)
    if rows is not None:
        assert text.splitlines() == rows
    path = tmp_path / "actions.csv"
    path.write_text(text)
    count = sum(1 for stage in plan.partition.stages if stage.kind.value != "B")
    schedule = _PipelineScheduleRuntime([Stage(0, count)], MICROBATCHES, loss_fn=lambda *_: None)  # type: ignore[list-item]
    schedule._load_csv(str(path))
    assert sorted(schedule.pipeline_order) == list(range(GPUS))
    read = [str(action) for rank in range(GPUS) for action in schedule.pipeline_order[rank]]
    assert sorted(read) == sorted(
        f"{s}{k}{m}" for s in range(count) for k in "FB" for m in range(MICROBATCHES)
    )
    assert any("RECV" in str(action) for action in schedule.pipeline_order_with_comms[1])


def test_stages_on_several_gpus_are_refused() -> None:
    plan = plan_of((chain(3), partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0"), 3, 2, "sync"))
    with pytest.raises(InvalidArgument, match=r"pipeline stage 0 is on GPUs \[0, 1\].* keeps a stage on one"):
        actions_csv(plan)


class Recorder:
    """Takes every call of a program."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **_: self.calls.append((name, arguments))


def test_python_replays_every_instruction_wait_and_event() -> None:
    plan = of_policy("1f1b")
    functions: dict[str, Any] = {}
    exec(schedule_python(plan), functions)
    timeline = simulate(plan.schedule)
    for gpu in range(GPUS):
        recorder = Recorder()
        functions[f"gpu{gpu}"](recorder)
        own = [action for action in plan.schedule.actions() if action.gpu == gpu]
        ids = [arguments[0] for name, arguments in recorder.calls if name not in ("wait", "record")]
        assert sorted(ids) == sorted(action.id for action in own)
        starts = [timeline.start_s[name] for name in ids]
        assert starts == sorted(starts)
        waits = [arguments[1] for name, arguments in recorder.calls if name == "wait"]
        assert sorted(waits) == sorted(event for action in own for event in action.waits)


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_in_one_step(pipe, "text")
    reader.join(10)
    assert read == [b"text"]
    assert pipe.is_fifo()
