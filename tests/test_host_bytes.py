from __future__ import annotations

from dataclasses import replace

from rpcompile.host_memory import HostMemory, host_memory
from rpcompile.ir import Schedule
from tests.chains import chain

BUFFERS = {
    "host:x.s0.m0": 3,
    "host:dx.s0.j2.m0": 2,
    "host:inputs.m0": 7,
    "gpu0:x.s0.j0.m0": 3,
    "host:loss.m0": 4,
}
SCHEDULE = Schedule("round_robin", "sync", 1, 1, (), (), BUFFERS)


def test_every_part_by_hand() -> None:
    """Three segments of 4 bytes of weights and gradients each."""
    found = host_memory(chain(3), SCHEDULE, "float32")
    assert found == HostMemory(12, 12, 0, 24, 5, 7)
    assert found.total_bytes == 60


def test_gradients_of_further_jobs_are_partial() -> None:
    """Segment 1 is trained by jobs 2 and 3, segment 0 by job 4; both iterations of mode async hold theirs."""
    landing = {"host:gradients.j2.s1": 4, "host:gradients.j3.s1": 4, "host:gradients.j4.s0": 4}
    more = replace(SCHEDULE, buffers={**BUFFERS, **landing, "host:gradients.j2.s2": 4})
    found = host_memory(chain(3), more, "float32")
    assert (found.gradient_bytes, found.partial_bytes, found.total_bytes) == (12, 4, 64)
    assert host_memory(chain(3), replace(more, mode="async"), "float32").partial_bytes == 8


def test_low_precision_with_masters() -> None:
    found = host_memory(chain(3), SCHEDULE, "bfloat16", masters=True, optimizer_states=1)
    assert (found.gradient_bytes, found.master_bytes, found.optimizer_bytes) == (12, 24, 24)
    found = host_memory(chain(3), SCHEDULE, "bfloat16")
    assert (found.master_bytes, found.optimizer_bytes) == (0, 24)
    assert host_memory(chain(3), SCHEDULE, "float32", masters=True).master_bytes == 0


def test_evaluation_has_no_gradients() -> None:
    found = host_memory(chain(3), replace(SCHEDULE, mode="forward"), "float32")
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (12, 0, 0)
