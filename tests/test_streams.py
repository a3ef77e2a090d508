"""Stream threads and events: order, waiting, cancelling."""

from __future__ import annotations

import threading

import pytest

from rpcompile.runtime.streams import Iteration, StreamThread


@pytest.fixture
def streams() -> object:
    made = [StreamThread(f"test-{index}", (index, "test")) for index in range(2)]
    yield made
    for stream in made:
        stream.close()
        stream.join()


def finish(iteration: Iteration, streams: list[StreamThread]) -> None:
    for event in [stream.drain(iteration) for stream in streams]:
        assert event.wait(5)


def test_tasks_of_a_stream_run_in_order_and_wait_for_events_of_another(streams: list[StreamThread]) -> None:
    iteration, seen = Iteration({}), []
    first, second = streams
    second.put(iteration, "wait e", lambda: iteration.wait("e"))
    second.put(iteration, "c", lambda: seen.append("c"))
    first.put(iteration, "a", lambda: seen.append("a"))
    first.put(iteration, "b", lambda: seen.append("b"))
    first.put(iteration, "record e", lambda: iteration.record("e"))
    finish(iteration, streams)
    assert seen == ["a", "b", "c"]


def test_first_failure_is_kept_and_ends_waiting_streams(streams: list[StreamThread]) -> None:
    iteration, seen = Iteration({}), []
    first, second = streams
    second.put(iteration, "wait never", lambda: iteration.wait("never"))
    second.put(iteration, "after", lambda: seen.append("after"))
    first.put(iteration, "bad", lambda: 1 // 0)
    finish(iteration, streams)
    assert seen == []
    assert iteration.failure is not None
    assert (iteration.failure.instruction, iteration.failure.gpu) == ("bad", 0)
    assert isinstance(iteration.failure.error, ZeroDivisionError)


def test_streams_serve_the_next_iteration_after_a_failure(streams: list[StreamThread]) -> None:
    broken, sound, done = Iteration({}), Iteration({}), threading.Event()
    streams[0].put(broken, "bad", lambda: 1 // 0)
    streams[0].put(sound, "good", done.set)
    assert done.wait(5)
    assert broken.failure is not None
    assert sound.failure is None


def test_hook_runs_before_each_instruction(streams: list[StreamThread]) -> None:
    seen: list[str] = []
    iteration = Iteration({}, before_instruction=seen.append)
    streams[0].put(iteration, "2F0", lambda: seen.append("ran"))
    finish(iteration, streams)
    assert seen == ["2F0", "ran"]
