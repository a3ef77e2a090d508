"""What the verifier proves; random mutants of valid schedules are in test_mutants.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from rpcompile.errors import ScheduleError
from rpcompile.ir import Op, Schedule, SegmentChain
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests.chains import action, chain, compiled, edit, partition, rewrite, with_transfers, without
from tests.dispatches import compiled as compiled_dispatch
from tests.dispatches import of_steps

STAGES = partition("F0-1", "FB2-2", "B1-1", "B0-0")
STATE = {1: {"state_bytes": 1, "inputs": ("mask",), "input_bytes": 1}, 2: {"state_bytes": 2}}


def rejects(schedule: Schedule, chain: SegmentChain, stages=STAGES) -> str | None:
    """The verifier's message, None if it accepts."""
    try:
        verify_schedule(schedule, chain, stages)
    except ScheduleError as error:
        return str(error)
    return None


# --------------------------------------------------------------------------- mutants of valid schedules

PROBLEMS = {
    "two gpus": (chain(3, STATE), STAGES, 2, 2, "sync"),
    "one gpu": (chain(3, STATE), STAGES, 1, 2, "sync"),
    "three jobs a gpu": (chain(4), partition("F0-0", "F1-1", "FB2-3", "B1-1", "B0-0"), 2, 1, "sync"),
    "evaluation": (chain(3), partition("F0-0", "F1-1", "F2-2"), 2, 3, "forward"),
}


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request):
    chain, stages, *rest = PROBLEMS[request.param]
    schedule = compiled(chain, stages, *rest)
    verify_schedule(schedule, chain, stages)
    return schedule, chain, stages


def test_removing_any_record_is_caught(problem):
    schedule, chain, stages = problem
    for found in [found for found in schedule.actions() if found.records]:
        message = rejects(edit(schedule, found.id, records=()), chain, stages)
        assert message is not None
        assert f"waits for event {found.records[0]}, which no action records" in message


def test_removing_any_action_is_caught(problem):
    schedule, chain, stages = problem
    for id in [found.id for found in schedule.actions()]:
        assert rejects(without(schedule, id), chain, stages), id


def test_removing_any_action_is_caught_even_if_events_are_made_anew(problem):
    schedule, chain, stages = problem
    for id in [found.id for found in schedule.actions()]:
        mutant = without(schedule, id)
        for found in mutant.actions():
            mutant = edit(mutant, found.id, after=tuple(name for name in found.after if name != id))
        try:
            mutant = InsertEventWaits().run(mutant)
        except ScheduleError:
            continue
        assert rejects(mutant, chain, stages), id


def test_repeating_any_action_is_caught(problem):
    schedule, chain, stages = problem
    for found in schedule.actions():
        copies = {found.id: found, "other": replace(found, id=f"{found.id.split('.')[0]}.99", records=())}
        mutants = {
            name: rewrite(schedule, lambda a, id=found.id, copy=copy: [a, copy] if a.id == id else [a])
            for name, copy in copies.items()
        }
        assert f"{found.id}: 2 actions have this id" in (rejects(mutants[found.id], chain, stages) or "")
        assert rejects(mutants["other"], chain, stages), found.id


# --------------------------------------------------------------------------- messages

CHAIN = chain(3, STATE)
VALID = compiled(CHAIN, STAGES, 2, 2)


def again(schedule: Schedule) -> Schedule:
    """The same schedule with events that fit its reads and writes."""
    return InsertEventWaits().run(schedule)


def swapped(schedule: Schedule, left: str, right: str) -> Schedule:
    first, second = action(schedule, left), action(schedule, right)
    return rewrite(schedule, lambda a: [second if a is first else first if a is second else a])


def moved(schedule: Schedule, id: str, before: str) -> Schedule:
    found = action(schedule, id)
    return rewrite(without(schedule, id), lambda a: [found, a] if a.id == before else [a])


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (
            replace(VALID, queues=(*VALID.queues, VALID.queues[0])),
            "gpu0 has 2 compute queues; it must have one",
        ),
        (
            replace(VALID, queues=(*VALID.queues, replace(VALID.queues[0], gpu=2))),
            "there is a queue of gpu2; the schedule has 2 GPUs",
        ),
        (replace(VALID, jobs=VALID.jobs[::-1]), "job 0 of the schedule is numbered 3"),
        (
            replace(VALID, jobs=(*VALID.jobs[:3], replace(VALID.jobs[3], stage=4))),
            "job 3: the partition has no stage 4",
        ),
        (
            replace(VALID, jobs=(replace(VALID.jobs[0], microbatches=(0, 1, 2)), *VALID.jobs[1:])),
            "job 0 runs 2 microbatches of (0, 1, 2)",
        ),
        (
            edit(VALID, "0X0.0", frees=action(VALID, "0X0.0").frees * 2),
            "0X0.0 names gpu0:inputs.j0.m0 twice",
        ),
        (edit(VALID, "0F0", nbytes=1), "0F0: only copies move bytes, only compute actions have a workspace"),
        (edit(VALID, "0H0", workspace_bytes=1), "0H0: only copies move bytes, only compute actions have a"),
        (edit(VALID, "0F0", workspace_bytes=1), "0F0 has a workspace of 1 bytes; it needs 8"),
        (edit(VALID, "2B0", workspace_bytes=1), "2B0 has a workspace of 1 bytes; it needs 0"),
        (
            replace(VALID, buffers={**VALID.buffers, "gpu0:tape.j2.m0": 1}),
            "2R0 leaves gpu0:tape.j2.m0 of 1 bytes; its stage needs 13",
        ),
        (without(VALID, "2R1"), "right before 2B1 comes 2B0; its recompute 2R1 must"),
        (swapped(VALID, "2R0", "2B0"), "right before 2B0 comes 0F1; its recompute 2R0 must"),
        (swapped(VALID, "2R0", "2R1"), "right before 2B0 comes 2R1; its recompute 2R0 must"),
        (moved(VALID, "2R1", "2B0"), "2R0 recomputes for no backward: 2R1 comes right behind it"),
        (moved(VALID, "2R0", "0F0"), "2R0 recomputes for no backward: 0F0 comes right behind it"),
        (
            rewrite(VALID, lambda a: [replace(a, id="2R0.1"), a] if a.id == "2R0" else [a]),
            "2R0.1 recomputes for no backward: 2R0 comes right behind it",
        ),
        (
            rewrite(
                VALID, lambda a: [a, replace(action(VALID, "2R1"), id="2R1.1")] if a.id == "2B1" else [a]
            ),
            "2R1.1 recomputes for no backward: nothing comes behind it",
        ),
        (
            edit(VALID, "2B0", reads=action(VALID, "2B0").reads[:-1]),
            "2B0 must read gpu0:tape (job 2, microbatch 0)",
        ),
        (
            edit(VALID, "2R0", reads=(*action(VALID, "2R0").reads, "gpu0:dx.s1.j2.m0")),
            "2R0 must not read gpu0:dx (segment 1, microbatch 0)",
        ),
        (
            edit(VALID, "2B0", id="2R0.1", op=Op.RECOMPUTE),
            "segment 1, microbatch 0 has 0 backwards (no action); it must have one",
        ),
        (
            replace(
                edit(VALID, "0O@0.1", writes=("host:state.j1.s1",)),
                buffers={**VALID.buffers, "host:state.j1.s1": 1},
            ),
            "0O@0.1 copies gpu0:weights.j0.s1 to host:state.j1.s1, which is something else",
        ),
        (edit(VALID, "0F0", stage=1), "0F0: its stage, op, microbatch or job differ from its id"),
        (edit(VALID, "0P@0.1", job=2), "0P@0.1: its stage, op, microbatch or job differ from its id"),
        (edit(VALID, "0F0", gpu=1), "0F0 is queued on gpu0 compute; it belongs on gpu1 compute"),
        (edit(VALID, "0F0", job=2), "0F0: no job 2 runs stage 0 on gpu0"),
        (edit(VALID, "0F0", job=77), "0F0: no job 77 runs stage 0 on gpu0"),
        (edit(VALID, "0F0", id="0F5", microbatch=5), "0F5: job 0 has no microbatch 5"),
        (edit(VALID, "0L0", frees=("gpu0:loss.m0",)), "0L0: FREE, and nothing else, frees buffers"),
        (edit(VALID, "0X0.0", frees=()), "0X0.0: FREE, and nothing else, frees buffers"),
        (edit(VALID, "0F0", reads=("gpu0:x.s9.j0.m0",)), "0F0 uses gpu0:x.s9.j0.m0, which has no size"),
        (
            edit(VALID, "0F0", reads=("gpu1:loss.m0",)),
            "0F0 runs on gpu0 and cannot reach gpu1:loss.m0",
        ),
        (
            edit(VALID, "0F1", id="0F9", microbatch=0),
            "0F9: its stage, op, microbatch or job differ from its id",
        ),
        (
            edit(VALID, "0F1", id="0F0.1", microbatch=0),
            "segment 0, microbatch 0 has 2 forwards (0F0, 0F0.1); it must have one",
        ),
        (
            edit(VALID, "1FB0", id="1F0", op=Op.FORWARD),
            "1F0 runs stage 1, which is of kind FB",
        ),
        (
            without(VALID, "2B1"),
            "segment 1, microbatch 1 has 0 backwards (no action); it must have one",
        ),
        (swapped(VALID, "0F0", "0F1"), "0F1 is out of order: job 0 runs (0, 1)"),
        (
            edit(VALID, "2B0", reads=action(VALID, "2B0").reads[1:]),
            "2B0 must read gpu0:weights (segment 1, job 2)",
        ),
        (
            edit(VALID, "1FB0", reads=(*action(VALID, "1FB0").reads, "gpu1:dx.s1.j1.m0")),
            "1FB0 must not read gpu1:dx (segment 1, microbatch 0)",
        ),
        (
            edit(VALID, "1FB0", writes=action(VALID, "1FB0").writes[:-1]),
            "1FB0 must write gpu1:loss (microbatch 0)",
        ),
        (
            edit(VALID, "2B0", writes=(*action(VALID, "2B0").writes, "gpu0:weights.j2.s1")),
            "2B0 must not write gpu0:weights (segment 1, job 2)",
        ),
        (edit(VALID, "0L0", writes=()), "0L0 copies 1 buffers into 0"),
        (
            edit(VALID, "0H0", reads=("host:x.s1.m0",), writes=("gpu0:x.s1.j0.m0",)),
            "0H0 copies host:x.s1.m0 to gpu0:x.s1.j0.m0 on the d2h stream",
        ),
        (
            edit(VALID, "0H0", reads=("gpu0:inputs.j0.m0",)),
            "0H0 copies gpu0:inputs.j0.m0 to host:x.s1.m0; HANDOFF does not do that",
        ),
        (
            edit(VALID, "0H0", reads=("gpu0:x.s0.j0.m0",)),
            "0H0 copies gpu0:x.s0.j0.m0 to host:x.s1.m0, which is something else",
        ),
        (
            replace(VALID, buffers={**VALID.buffers, "host:x.s1.m0": 2}),
            "0H0 copies gpu0:x.s1.j0.m0 to host:x.s1.m0, which have 1 and 2 bytes",
        ),
        (
            edit(
                replace(VALID, buffers={**VALID.buffers, "host:gradients.j1.s1": 4}),
                "2G@2.1",
                writes=("host:gradients.j1.s1",),
            ),
            "2G@2.1 copies gpu0:gradients.j2.s1 to host:gradients.j1.s1, which is something else",
        ),
        (edit(VALID, "0H0", nbytes=5), "0H0 moves 5 bytes; what it writes has 1"),
        (edit(VALID, "0H0", nbytes=0), "0H0 moves 0 bytes; what it writes has 1"),
        (
            edit(
                replace(VALID, buffers={**VALID.buffers, "host:dx.s1.j2.m0": 1}),
                "1H0",
                writes=("host:dx.s1.j2.m0",),
            ),
            "1H0 copies gpu1:dx.s1.j1.m0 to host:dx.s1.j2.m0, which is something else",
        ),
        (
            edit(VALID, "2P@2.1", after=("7X@7.0",)),
            "2P@2.1 must come after 7X@7.0, which the schedule does not have",
        ),
        (edit(VALID, "0F0", waits=("e99",)), "0F0 waits for event e99, which no action records"),
        (edit(VALID, "1V0", waits=()), "1V0 does not wait for 0H0, which writes host:x.s1.m0"),
        (
            edit(VALID, "2B0", waits=action(VALID, "2B0").waits[:1]),
            "2B0 does not wait for 0X0.2, which frees the memory it needs",
        ),
        (
            swapped(VALID, "0X@0.0", "0F1"),
            "0X@0.0 does not wait for 0F1, which uses gpu0:weights.j0.s0 that it frees",
        ),
        (
            again(edit(VALID, "2X0.1", frees=("host:x.s0.m0",))),
            "host:dx.s1.j1.m0, written by 1H0, is freed by no action; one action must",
        ),
        (
            again(edit(VALID, "2X0.1", frees=(*action(VALID, "2X0.1").frees, "host:loss.m0"))),
            "host:loss.m0, written by 1O0, is freed by 2X0.1; it is a result and stays",
        ),
        (
            again(edit(VALID, "2X0.1", frees=(*action(VALID, "2X0.1").frees, "host:inputs.m0"))),
            "2X0.1 writes or frees host:inputs.m0, which the caller owns",
        ),
        (
            again(without(VALID, "2G@2.1")),
            "gpu0:gradients.j2.s1 is downloaded by no action; one GRADIENT must",
        ),
        (
            again(without(VALID, "0O@0.1")),
            "gpu0:weights.j0.s1 is downloaded by no action; one OFFLOAD must",
        ),
        (
            again(without(VALID, "1O1")),
            "the loss of microbatch 1 never reaches the host",
        ),
    ],
)
def test_messages(mutant, message):
    found = rejects(mutant, CHAIN)
    assert found is not None
    assert message in found


def test_a_gradient_downloaded_before_its_last_contribution():
    message = rejects(edit(VALID, "2G@2.1", waits=action(VALID, "2H0").waits), CHAIN)
    assert message == "2G@2.1 does not wait for 2B1, the last to update gpu0:gradients.j2.s1 that it reads"


def test_changed_buffers_come_from_one_job(monkeypatch):
    monkeypatch.setattr(LayOutDispatch, "_check_state", lambda self, dispatch: None)  # which refuses it first
    steps = [(m, 0, m, m) for m in range(2)] + [(1, s, m, 0) for s in (1, 2, 3) for m in range(2)]
    divided = compiled_dispatch(CHAIN, STAGES, of_steps("divided", 2, 2, steps))
    message = rejects(divided, CHAIN)
    assert message is not None
    expected = (
        r"0O@(\d)\.1 brings down buffers of segment 1 that job \1 changed, and so does job \d; one job must"
    )
    assert re.fullmatch(expected, message)


def test_a_third_jobs_weights():
    """Without `after` every event that remains is about data, so a third upload may come too early."""
    big = chain(4, {index: {"weight_bytes": 1000} for index in range(4)})
    stages = partition("F0-0", "F1-1", "F2-2", "F3-3", memory_limit_bytes=2500)
    schedule = with_transfers(big, stages, gpus=1, microbatches=2, mode="forward")
    assert rejects(again(schedule), big, stages) is None
    crowded = again(rewrite(schedule, lambda found: [replace(found, after=())]))
    message = rejects(crowded, big, stages)
    assert message is not None
    assert re.fullmatch(r"gpu0 may need [34],\d+ bytes at its peak, over the limit of 2,500; use .*", message)


def test_a_peak_over_the_limit():
    tight = partition("F0-1", "FB2-2", "B1-1", "B0-0", memory_limit_bytes=20)
    assert rejects(VALID, CHAIN, tight) == (
        "gpu0 may need 34 bytes at its peak, over the limit of 20; use smaller stages or microbatches"
    )


def test_a_host_over_its_limit():
    peak = simulate(VALID).host_peak_bytes
    verify_schedule(VALID, CHAIN, STAGES, host_limit_bytes=peak)
    with pytest.raises(ScheduleError, match=f"the host needs {peak} bytes at its simulated peak, over the"):
        verify_schedule(VALID, CHAIN, STAGES, host_limit_bytes=peak - 1)


def test_a_deadlock():
    mutant = edit(VALID, "0H0", waits=(*action(VALID, "0H0").waits, *action(VALID, "2H0").records))
    message = rejects(mutant, CHAIN)
    assert message is not None
    assert message == (
        "deadlock: 0H0 (gpu0 d2h) waits for 2H0 (gpu0 d2h), which is queued behind 0H0 (gpu0 d2h)"
    )


def test_any_buffer_of_another_size_is_caught(problem):
    """Also of what stays on its GPU, which no copy has to agree with."""
    schedule, chain, stages = problem
    for name, nbytes in schedule.buffers.items():
        if ":loss" in name:
            continue
        smaller = replace(schedule, buffers={**schedule.buffers, name: nbytes - 1})
        assert rejects(smaller, chain, stages), name


def test_a_copy_of_less_than_the_weights():
    smaller = {"gpu0:weights.j0.s0": 3, "host:weights.s0": 3}
    mutant = replace(edit(VALID, "0P@0.0", nbytes=3), buffers={**VALID.buffers, **smaller})
    assert rejects(mutant, CHAIN) == "0P@0.0 uses gpu0:weights.j0.s0 of 3 bytes; what it holds has 4"


def test_a_backward_in_an_evaluation():
    plain = chain(3)
    mutant = replace(compiled(plain, STAGES, 2, 2), mode="forward")
    assert rejects(mutant, plain) == "3B0 runs backward; in mode 'forward' nothing must"
