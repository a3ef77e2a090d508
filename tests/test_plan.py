"""Plan files: the round trip, what is refused, the schema, and the printed form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rpcompile.plan
from rpcompile.errors import PlanFileError, ScheduleError
from rpcompile.host_memory import HostMemory
from rpcompile.ir import ClassCost
from rpcompile.plan import Plan, Prediction
from rpcompile.simulate import simulate
from rpcompile.units import ranges, seconds, size
from tests.chains import chain, compiled, partition, problems


def plan_of(problem: tuple) -> Plan:
    chain, stages, gpus, microbatches, mode = problem
    schedule = compiled(chain, stages, gpus, microbatches, mode)
    timeline = simulate(schedule)
    prediction = Prediction(
        timeline.makespan_s,
        None,
        timeline.bubble,
        timeline.gpu_peak_bytes,
        timeline.host_peak_bytes,
        HostMemory(12, 12, 0, 24, 6, 0),
    )
    return Plan(
        "Toy",
        "f" * 64,
        "float32",
        gpus,
        microbatches,
        mode,
        chain,
        stages,
        schedule,
        prediction,
        {"torch": "2"},
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of((chain(3), partition("F0-1", "FB2-2", "B1-1", "B0-0"), 2, 2, "sync"))


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_what_is_loaded_equals_what_was_saved(problem: tuple, tmp_path: Path) -> None:
    plan = plan_of(problem)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_file_is_json_with_sorted_keys_and_nothing_else_beside_it(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert (content["format"], content["version"]) == ("rpcompile.plan", 4)
    assert list(content["plan"]) == sorted(content["plan"])
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


def test_saving_over_a_plan_replaces_it_whole(saved: Path, plan: Plan) -> None:
    other = replace(plan, model_name="Other")
    other.save(saved)
    assert Plan.load(saved) == other


def test_failed_write_leaves_the_old_plan(saved: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanFileError, match=r"plan\.json: cannot write the plan: No space left"):
        replace(plan, model_name="Other").save(saved)
    assert Plan.load(saved) == plan
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


def edited(saved: Path, *path: object, value: object) -> Path:
    """The file with one value replaced; None as value takes the key out."""
    content = json.loads(saved.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    if value is None:
        del place[path[-1]]  # type: ignore[arg-type]
    else:
        place[path[-1]] = value  # type: ignore[index]
    saved.write_text(json.dumps(content))
    return saved


ACTION = ("plan", "schedule", "queues", 0, "actions", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", "its format is 'other', not 'rpcompile.plan'"),
        (("version",), 5, "made by a newer rpcompile: its version is 5, this one reads 4"),
        (("version",), 0, "made by an unknown rpcompile: its version is 0"),
        (("plan", "gpus"), None, r"missing required field `gpus` - at `\$\.plan`"),
        (("plan", "gpus"), "two", r"Expected `int`, got `str` - at `\$\.plan\.gpus`"),
        (("plan", "gpus"), 0, "it has no GPUs"),
        (("plan", "microbatches"), 3, "for another number of GPUs or microbatches"),
        (("plan", "prediction", "iteration_s"), 1e400, "damaged|no plan file"),
        (("plan", "partition", "stages", 0, "last"), 9, "stage 0 at place 0 has segments 0..9"),
        (("plan", "schedule", "jobs", 1, "gpu"), 7, "job 1 at place 1 names stage 1 and GPU 7"),
        ((*ACTION, "job"), 99, "names job 99"),
        ((*ACTION, "seconds"), 1e308, r"action 0F0 takes 1e\+308 s, 0 bytes"),
        ((*ACTION, "seconds"), -1.0, "no time or move may be negative"),
        (("plan", "schedule", "buffers", "gpu0:x.s1.j0.m0"), -5, "buffer gpu0:x.s1.j0.m0 has -5 bytes"),
        (("plan", "chain", "hardware", "h2d_bytes_per_s"), 0, "h2d_bytes_per_s is 0.0; it must be above 0"),
        ((*ACTION, "writes"), ["gpu0:nothing"], "names the unknown buffer 'gpu0:nothing'"),
        ((*ACTION, "op"), "Q", "Invalid enum value 'Q'"),
        (("plan", "schedule", "rotate"), 2, "its iterations are shifted by 2 of 2 GPUs"),
        (("plan", "schedule", "mode"), "async", "its mode is 'sync' and its schedule's 'async'"),
        (("plan", "chain", "kind_of"), [0], "it says of 1 GPUs of 2 what kind they are"),
        ((*ACTION, "id"), "0F1", "its schedule does not hold"),
        (("plan", "schedule", "queues", 0, "actions"), [], "its schedule does not hold"),
    ],
)
def test_damaged_files_say_where(saved: Path, path: tuple, value: object, message: str) -> None:
    with pytest.raises(PlanFileError, match=message) as caught:
        Plan.load(edited(saved, *path, value=value))
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match="is no plan file"):
        Plan.load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot read the plan: No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanFileError, match="cannot read the plan: Is a directory"):
        Plan.load(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_give_a_plan_or_a_clean_error(data: st.DataObject, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 20)))
        content[start:end] = data.draw(
            st.binary(max_size=12) | st.sampled_from([b"-1", b"0", b"1e308", b'""', b"null"])
        )
    path.write_bytes(bytes(content))
    try:
        loaded = Plan.load(path)
    except PlanFileError:
        return
    assert str(loaded)


def test_schema_is_up_to_date() -> None:
    path = Path(rpcompile.plan.__file__).parent / "data" / "plan.schema.json"
    assert path.read_bytes() == rpcompile.plan.schema(), "run python -m rpcompile.plan"


def test_id_is_of_the_content_not_of_the_solver_s_time(plan: Plan) -> None:
    assert replace(plan, partition=replace(plan.partition, solve_s=9.0)).id == plan.id
    assert replace(plan, microbatches=3).id != plan.id


@pytest.mark.parametrize(
    ("gpus", "text"), [({3}, "3"), ({0, 1}, "0-1"), ({0, 1, 2, 5, 7, 8}, "0-2,5,7-8"), (set(), "")]
)
def test_gpus_of_a_stage_are_printed_as_ranges(gpus: set[int], text: str) -> None:
    assert ranges(gpus) == text


def test_printed_plan(plan: Plan) -> None:
    assert str(plan) == PRINTED


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.94e9, "2.9 GB")]
)
def test_sizes_are_decimal(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(("value", "text"), [(0.314, "0.31 s"), (0.012, "12.0 ms"), (8e-6, "8 us")])
def test_seconds_have_units(value: float, text: str) -> None:
    assert seconds(value) == text


PRINTED = """\
Plan 1846fc3d  Toy · float32 · 2 microbatches of the given size · sync
Hardware   2 x toy 1 GiB · h2d 0.0 GB/s (assumed)
Simulated  42.00 s/step · bubble 54.8 % · GPU peak 37 B · host peak 32 B
Host       weights 12 B · gradients 12 B · optimizer 24 B · boundaries 6 B
Solver     by hand FEASIBLE · gap 0.0 % · 0.0 s
stage   kind   gpu   segments          weights   boundary   compute   upload   bound by
───────────────────────────────────────────────────────────────────────────────────────
    0      F     0   layer0 … layer1       8 B        1 B    4.00 s   8.00 s    compute
    1     FB     1   layer2                4 B        1 B    5.00 s   4.00 s    compute
    2      B     0   layer1                4 B        1 B    5.00 s   4.00 s    compute
    3      B     1   layer0                4 B        0 B    5.00 s   4.00 s    compute
"""


def version_1(saved: Path) -> Path:
    """The file as version 1 had it."""
    content = json.loads(saved.read_text())
    content["version"] = 1
    del content["plan"]["chain"]["op_classes"]
    saved.write_text(json.dumps(content))
    return saved


def test_file_of_version_1_is_upgraded(saved: Path, plan: Plan) -> None:
    loaded = Plan.load(version_1(saved))
    assert loaded == replace(plan, prediction=loaded.prediction)


def test_schedule_of_version_2_is_laid_out_again() -> None:
    """The file is one that version 2 wrote: recompute and backward are one action there."""
    old = Path(__file__).parent / "data" / "plan_version_2.json"
    assert "R" not in {action["op"] for queue in _queues(old) for action in queue["actions"]}
    reads_mask = chain(3, {1: {"inputs": ("mask",), "input_bytes": 1}})
    expected = plan_of((reads_mask, partition("F0-1", "FB2-2", "B1-1", "B0-0"), 2, 2, "sync"))
    loaded = Plan.load(old)
    assert loaded.schedule == expected.schedule
    assert loaded.prediction.iteration_s == expected.prediction.iteration_s
    assert loaded.prediction.gpu_peak_bytes == expected.prediction.gpu_peak_bytes
    assert {entry.kind for gpu in loaded.actions().gpus for entry in gpu} == {"F", "R", "B", "FB"}


def test_schedule_of_version_2_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    content = json.loads((Path(__file__).parent / "data" / "plan_version_2.json").read_text())
    content["plan"]["schedule"]["queues"][0]["actions"] = []
    damaged = tmp_path / "plan.json"
    damaged.write_text(json.dumps(content))
    message = (
        r"its schedule cannot be laid out again: no job runs microbatch 0 of stage 0 \(F, segments 0..1\)"
    )
    with pytest.raises(PlanFileError, match=message):
        Plan.load(damaged)


def _queues(path: Path) -> list[dict]:
    return json.loads(path.read_text())["plan"]["schedule"]["queues"]


def test_file_of_version_1_without_a_chain_says_so(saved: Path) -> None:
    content = json.loads(version_1(saved).read_text())
    del content["plan"]["chain"]
    saved.write_text(json.dumps(content))
    with pytest.raises(PlanFileError, match="damaged: it is no plan of version 1: 'chain' is missing"):
        Plan.load(saved)


def test_a_version_2_field_is_not_part_of_version_1(saved: Path, plan: Plan) -> None:
    with_classes = replace(
        plan, chain=replace(plan.chain, op_classes=(ClassCost("matmul", 1, 2, 3, 4, 5, 6),))
    )
    with_classes.save(saved)
    assert Plan.load(saved) == with_classes
    assert Plan.load(version_1(saved)).chain == plan.chain


def test_load_without_verify_only_checks_numbers_and_references(saved: Path) -> None:
    content = json.loads(saved.read_text())
    queues = content["plan"]["schedule"]["queues"]
    queues[0]["actions"] = queues[0]["actions"][1:]  # 0F0 is gone
    saved.write_text(json.dumps(content))
    with pytest.raises(PlanFileError, match="its schedule does not hold"):
        Plan.load(saved)
    loaded = Plan.load(saved, verify=False)
    with pytest.raises(ScheduleError):
        loaded.verify()


def test_notebooks_show_the_text_and_a_picture(plan: Plan) -> None:
    shown = plan._repr_html_()
    assert "<pre>Plan" in shown
    assert '<img alt="timeline" src="data:image/png;base64,iVBOR' in shown
