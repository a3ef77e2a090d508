"""How long a dispatch takes: a model fast enough to be asked a hundred thousand times by a search.

Jobs run in the order of their stages, each GPU one job after the other, each job its microbatches in
the order in which they arrive. With c the compute seconds of a microbatch and h the hop into a stage::

    start(stage, m) = max(end(stage - 1, m) + (h if it ran on another GPU), end of what the GPU ran before)
    the first a seconds of a backward (recompute) do without the gradient, but not without the saved input
    upload starts   = max(end of the upload before, end of the job two before)       two resident jobs
    a job's first microbatch also waits for its upload and, if it makes gradients, until the gradients
    of the gradient-making job two before have left the GPU

Gradients leave after a job's last microbatch. Where several jobs of a stage make gradients of the same
weights, the host adds them up as they arrive. With an optimizer, weights are updated from
the first segment on, once all gradients are final (clipping needs their norm), and every upload
waits for its own segments. All of that draws on the host's memory bandwidth, which is kept as bytes
left in short intervals of time: who asks first is served first.

What it simplifies: a link that is busy with activations slows a weight upload down by the share it is
busy on average, activations themselves never wait for a link, and host bandwidth is not shared out
fairly but by order. `rpcompile.simulate` has all of that exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]

SLICES = 1024  # intervals in which host bandwidth is kept account of
_PLAY_WORK = 2.0  # of one microbatch of one stage, in the units of `Played.work`
_DEAL_WORK = 2.0  # the same, of dealing it out
_JOB_WORK = 4.0  # of a job's uploads and downloads
_HANDED = 0.9  # a link is never so busy with activations that weights get less than the rest


class Machine(NamedTuple):
    """What the stages run on, as numbers that compiled code takes.

    Attributes:
        speed: Compute speed of each GPU, relative to the one that times were taken on.
        limit_bytes: Memory that a plan may use of each GPU.
        up_bytes_per_s: Host to device.
        down_bytes_per_s: Device to host.
        latency_s: Fixed time of one transfer.
        host_bytes_per_s: Host memory bandwidth, for all transfers and host work together.
        update_s_per_byte: Optimizer seconds per byte of gradient; 0 leaves the optimizer out.
        slice_s: Length of the intervals of host bandwidth.
        iterations: 1 for one iteration; more are chained back to back (asynchronous).
        ring: Whether GPUs are taken in a ring, each iteration beginning where the one before ended.
    """

    speed: np.ndarray
    limit_bytes: np.ndarray
    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float
    host_bytes_per_s: float
    update_s_per_byte: float
    slice_s: float
    iterations: int
    ring: bool


class Stages(NamedTuple):
    """What one microbatch (times, copies) or one job (weights, gradients) of each stage costs.

    Attributes:
        compute_s: On a GPU of speed 1.
        ahead_s: The part of it that comes first and needs no gradient.
        saved_by: Stage that makes the input which that part needs; -1 if it is the caller's.
        saved_hop_s: That input's way over the host.
        hop_s: Into the stage, from another GPU.
        handed_bytes: What comes with a hop.
        loaded_bytes: All that is copied up.
        weight_bytes: Uploaded by each job.
        gradient_bytes: Downloaded by each job.
        updated_bytes: Gradients of the segments that this stage is the first to need; 0 for B stages.
        memory_bytes: All that one job of the stage can have on its GPU, but for `kept_bytes`.
        lingering_bytes: Not 0 if the stage changes buffers of the model, which only one job may do.
        stored_bytes: All that is copied down.
        kept_bytes: The part of it that a backward stage recomputes from and that lies inside this stage.
    """

    compute_s: np.ndarray
    ahead_s: np.ndarray
    saved_by: np.ndarray
    saved_hop_s: np.ndarray
    hop_s: np.ndarray
    handed_bytes: np.ndarray
    loaded_bytes: np.ndarray
    weight_bytes: np.ndarray
    gradient_bytes: np.ndarray
    updated_bytes: np.ndarray
    memory_bytes: np.ndarray
    lingering_bytes: np.ndarray
    stored_bytes: np.ndarray
    kept_bytes: np.ndarray


class Played(NamedTuple):
    """What playing a dispatch says.

    Attributes:
        time_s: Makespan of one iteration; of chained ones, what each adds.
        idle_s: Mean over GPUs from their last work to the end: how uneven the end is.
        upload_bytes: Of one iteration.
        excess_bytes: Largest excess of a job's residency over its GPU's limit.
        work: What playing it took, in units of about 5 ns.
    """

    time_s: float
    idle_s: float
    upload_bytes: float
    excess_bytes: float
    work: float


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _draw(left: np.ndarray, slice_s: float, start: float, nbytes: float, rate: float) -> float:
    """Moves bytes at no more than `rate` through what is left of the host's bandwidth; when it ends."""
    time = start
    k = int(time / slice_s)
    while nbytes > 0.0 and k < left.size:
        span = (k + 1) * slice_s - time
        most = rate * span
        if most > left[k]:
            most = left[k]
        if nbytes <= most:
            left[k] -= nbytes
            return time + span * nbytes / most
        left[k] -= most
        nbytes -= most
        k += 1
        time = k * slice_s
    return time + nbytes / rate


class _Gpus(NamedTuple):
    """What is known of each GPU while a dispatch is played: (gpus,) arrays.

    Attributes:
        free: End of what it has computed.
        before: End of the job before its last one.
        uploaded: End of its last upload.
        sent: End of its last download of gradients.
        sent_before: The same of the download before.
        busy: Share of its link that activations take.
        memory: What its last job can have on it.
        gradients: Of its last job.
        loaded: All that its last job copies up.
        stored: All that its last job copies down.
        load: What stages that are dealt out give it to do.
        lands: Scratch for dealing out.
        took: Seconds of one microbatch of this stage.
        ahead: The part of it that needs no gradient.
        jobs: Microbatches of this stage that it has.
        here: Those of them that come from the same GPU.
        chosen: Scratch for dealing out.
    """

    free: np.ndarray
    before: np.ndarray
    uploaded: np.ndarray
    sent: np.ndarray
    sent_before: np.ndarray
    busy: np.ndarray
    memory: np.ndarray
    gradients: np.ndarray
    loaded: np.ndarray
    stored: np.ndarray
    load: np.ndarray
    lands: np.ndarray
    took: np.ndarray
    ahead: np.ndarray
    jobs: np.ndarray
    here: np.ndarray
    chosen: np.ndarray


class _Queue(NamedTuple):
    """Where the microbatches are: (microbatches,) arrays.

    Attributes:
        ready: End of each in the stage before.
        came: The GPU that it was on; -1 before the first stage.
        at: The GPU that it goes to.
        line: Microbatches in the order they arrive.
    """

    ready: np.ndarray
    came: np.ndarray
    at: np.ndarray
    line: np.ndarray


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _deal(
    machine: Machine, stages: Stages, s: int, width: int, g: _Gpus, q: _Queue, gpu_of: np.ndarray
) -> None:
    """Deals a stage out to the GPUs that are free first, or have least to do where iterations are chained."""
    count, chained = machine.speed.size, machine.iterations > 1
    for k in range(count):
        landed = max(g.uploaded[k], g.before[k]) + stages.weight_bytes[s] / machine.up_bytes_per_s
        g.lands[k] = g.load[k] if chained else max(landed, g.free[k])
        g.chosen[k] = k
    for i in range(width):
        for k in range(i + 1, count):
            if g.lands[g.chosen[k]] < g.lands[g.chosen[i]]:
                g.chosen[i], g.chosen[k] = g.chosen[k], g.chosen[i]
    for m in q.line:
        best, least = g.chosen[0], np.inf
        for i in range(width):
            k = g.chosen[i]
            end = g.lands[k]
            if not chained:
                hop_s = 0.0 if q.came[m] == k or q.came[m] < 0 else stages.hop_s[s]
                end = max(end, q.ready[m] + hop_s - g.ahead[k])
            end += g.took[k]
            if end < least:
                best, least = k, end
        g.lands[best] = least
        if chained:
            g.load[best] = least
        gpu_of[s, m] = best


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _arrange(q: _Queue) -> None:
    """Microbatches in the order they arrive; nearly sorted already."""
    for i in range(1, q.line.size):
        m, k = q.line[i], i - 1
        while k >= 0 and q.ready[q.line[k]] > q.ready[m]:
            q.line[k + 1] = q.line[k]
            k -= 1
        q.line[k + 1] = m


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _send_up(
    machine: Machine, stages: Stages, s: int, released: float, sets: int, g: _Gpus, left: np.ndarray
) -> tuple[float, float]:
    """Uploads the weights of a stage's jobs and has their GPUs wait for them.

    Returns:
        Bytes uploaded, and the largest excess over a GPU's memory.
    """
    nbytes, gradient = stages.weight_bytes[s], stages.gradient_bytes[s]
    loaded, stored = stages.loaded_bytes[s], stages.stored_bytes[s]
    uploaded, excess = 0.0, 0.0
    for k in range(machine.speed.size):
        if g.jobs[k] == 0:
            continue
        # What `StageCosts.resident_bytes` has: of the job before with what comes for this one, and
        # of this one with what the job before leaves behind.
        ahead_bytes = nbytes + max(0.0, loaded - (sets - 1) * g.loaded[k])
        excess = max(excess, g.memory[k] + ahead_bytes - machine.limit_bytes[k])
        # What was made right here waits in place; the sets of copies are for the others.
        copies = min(sets, g.jobs[k] - g.here[k]) - sets
        own = stages.memory_bytes[s] + sets * stages.kept_bytes[s]
        own += (g.here[k] + copies) * stages.handed_bytes[s]
        own += g.gradients[k] + max(0.0, g.stored[k] - (sets - 1) * stored)
        excess = max(excess, own - machine.limit_bytes[k])
        g.memory[k], g.gradients[k], g.loaded[k], g.stored[k] = own, gradient, loaded, stored
        gate = g.free[k]
        if nbytes > 0.0:
            begin = max(max(g.uploaded[k], g.before[k]), released) + machine.latency_s
            rate = machine.up_bytes_per_s * (1.0 - g.busy[k])
            g.uploaded[k] = _draw(left, machine.slice_s, begin, nbytes, rate)
            gate = max(gate, g.uploaded[k])
            uploaded += nbytes
        if gradient > 0.0:
            gate = max(gate, g.sent_before[k])
        g.before[k] = g.free[k]
        g.free[k] = gate
    return uploaded, excess


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _compute(
    machine: Machine,
    stages: Stages,
    s: int,
    g: _Gpus,
    q: _Queue,
    left: np.ndarray,
    order: np.ndarray,
    ends: np.ndarray,
) -> None:
    """Runs all microbatches of a stage."""
    saved_by, saved_hop_s, hop_s = stages.saved_by[s], stages.saved_hop_s[s], stages.hop_s[s]
    for i in range(q.line.size):
        m = q.line[i]
        k = q.at[m]
        start, since = g.free[k], q.ready[m] - g.ahead[k]
        if saved_by >= 0:
            start = max(start, ends[saved_by, m] + saved_hop_s)
        if q.came[m] != k and q.came[m] >= 0:
            since += hop_s
            place = int(start / machine.slice_s)
            if place < left.size:
                left[place] = max(0.0, left[place] - 2.0 * stages.handed_bytes[s])
        end = max(start, since) + g.took[k]
        g.free[k] = q.ready[m] = ends[s, m] = end
        q.came[m] = k
        order[s, i] = m


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _send_down(machine: Machine, stages: Stages, s: int, g: _Gpus, left: np.ndarray) -> float:
    """Downloads the gradients of a stage's jobs and adds them up; when the sum is there."""
    gradient, parts, seen, arrived = stages.gradient_bytes[s], 0, 0, 0.0
    for k in range(machine.speed.size):
        parts += g.jobs[k] > 0
    for k in range(machine.speed.size):
        if g.jobs[k] == 0:
            continue
        loaded = stages.loaded_bytes[s] - stages.handed_bytes[s] * g.here[k] / g.jobs[k]
        spent = g.took[k] * machine.up_bytes_per_s
        g.busy[k] = min(_HANDED, loaded / spent) if spent > 0.0 else 0.0
        if gradient > 0.0:
            begin = max(g.sent[k], g.free[k]) + machine.latency_s
            g.sent_before[k] = g.sent[k]
            g.sent[k] = _draw(left, machine.slice_s, begin, gradient, machine.down_bytes_per_s)
            seen += 1
            # A pass over memory reads the sum and what has landed, and writes the sum; the norm
            # of the whole is one more to read.
            passes = 0.0 if seen == 1 else 1.0 if g.sent[k] <= arrived and seen > 2 else 3.0
            passes += 1.0 if seen == parts > 1 and machine.update_s_per_byte > 0.0 else 0.0
            arrived = max(arrived, g.sent[k])
            arrived = _draw(left, machine.slice_s, arrived, passes * gradient, machine.host_bytes_per_s)
    return arrived


@njit(cache=True, nogil=True, error_model="numpy")
def play(
    machine: Machine,
    stages: Stages,
    gpu_of: np.ndarray,
    wanted: np.ndarray,
    order: np.ndarray,
    ends: np.ndarray,
    limit_s: float,
) -> Played:
    """Plays a dispatch; where `wanted` is not 0, it deals that many jobs out first.

    Args:
        machine: What it runs on.
        stages: Costs, in the order of execution.
        gpu_of: (stages, microbatches) GPU of each; rewritten for stages that are dealt out.
        wanted: (stages,) number of GPUs to deal a stage out to, 0 to keep `gpu_of`.
        order: (stages, microbatches) filled with the microbatches in the order they arrive.
        ends: (stages, microbatches) filled with the end of each, in the last iteration.
        limit_s: A single iteration that is bound to take longer is not played to its end; its time is
            then infinite.
    """
    # Loops instead of slices and array methods throughout: those take numba many seconds to compile.
    count, microbatches = gpu_of.shape
    sets = min(2, microbatches)  # microbatches whose copies a GPU holds at once
    gpus, slice_s = machine.speed.size, machine.slice_s
    left = np.full(SLICES, machine.host_bytes_per_s * slice_s)
    a, b = np.zeros((14, gpus)), np.zeros((3, gpus), np.int64)
    g = _Gpus(
        a[0],
        a[1],
        a[2],
        a[3],
        a[4],
        a[5],
        a[6],
        a[7],
        a[8],
        a[9],
        a[10],
        a[11],
        a[12],
        a[13],
        b[0],
        b[1],
        b[2],
    )
    c = np.zeros((3, microbatches), np.int64)
    q = _Queue(np.zeros(microbatches), c[0], c[1], c[2])
    last_free = np.zeros(gpus)
    final = final_before = updated = upload_bytes = excess = 0.0
    chained, dealt_jobs, settled_s = machine.iterations > 1, 0, 0.0
    speed, todo_s, work = 0.0, 0.0, 0.0
    for k in range(gpus):
        speed += machine.speed[k]
    for s in range(count):
        todo_s += microbatches * stages.compute_s[s]
    for iteration in range(machine.iterations):
        for m in range(microbatches):
            q.ready[m], q.came[m] = 0.0, -1
            if iteration == 0:
                q.line[m] = m
        for k in range(gpus):
            last_free[k] = g.free[k]
            if iteration == machine.iterations // 2:
                settled_s += g.free[k] / gpus
        shift = iteration * dealt_jobs % gpus if machine.ring else 0
        # An upload waits for the update of the iteration two before, or of the one before (time 0).
        if iteration >= 2:
            updated = max(updated, final_before)
        waits = iteration >= 2 if chained else machine.update_s_per_byte > 0.0
        final_before = final
        for s in range(count):
            for k in range(gpus):
                g.took[k] = stages.compute_s[s] / machine.speed[k]
                g.ahead[k] = stages.ahead_s[s] / machine.speed[k]
                g.jobs[k] = g.here[k] = 0
            released = 0.0
            if waits:
                nbytes = stages.updated_bytes[s] * machine.update_s_per_byte * machine.host_bytes_per_s
                updated = _draw(left, slice_s, updated, nbytes, machine.host_bytes_per_s)
                released = updated
            _arrange(q)
            if wanted[s] > 0 and iteration == 0:
                width = min(wanted[s], gpus if stages.lingering_bytes[s] == 0.0 else 1)
                if machine.ring:
                    for m in range(microbatches):
                        gpu_of[s, m] = (dealt_jobs + m % width) % gpus
                else:
                    _deal(machine, stages, s, width, g, q, gpu_of)
                    work += _DEAL_WORK * microbatches
            for m in range(microbatches):
                k = gpu_of[s, m] + shift
                if k >= gpus:
                    k -= gpus
                q.at[m] = k
                g.jobs[k] += 1
                g.here[k] += q.came[m] == k
            parts = 0
            for k in range(gpus):
                parts += g.jobs[k] > 0
            if iteration == 0:
                dealt_jobs += parts
            work += _PLAY_WORK * microbatches + _JOB_WORK * parts
            uploaded, over = _send_up(machine, stages, s, released, sets, g, left)
            upload_bytes += uploaded
            excess = max(excess, over)
            if parts > 1 and stages.lingering_bytes[s] > 0.0:
                for k in range(gpus):
                    excess = max(excess, machine.limit_bytes[k])
            _compute(machine, stages, s, g, q, left, order, ends)
            final = max(final, _send_down(machine, stages, s, g, left))
            spent_s = 0.0
            for k in range(gpus):
                final = max(final, g.free[k])
                spent_s += machine.speed[k] * g.free[k]
            todo_s -= microbatches * stages.compute_s[s]
            if not chained and spent_s + todo_s > limit_s * speed:
                return Played(np.inf, 0.0, upload_bytes, excess, work)
    time_s, mean_s, spread = 0.0, 0.0, 0.0
    for k in range(gpus):
        mean_s += g.free[k] / gpus
        time_s = max(time_s, g.free[k] - last_free[k])
    if not chained:
        return Played(final, final - mean_s, upload_bytes, excess, work)
    if machine.ring:
        time_s = (mean_s - settled_s) / (machine.iterations - machine.iterations // 2)
        return Played(time_s, 0.0, upload_bytes / machine.iterations, excess, work)
    mean_s = 0.0
    for k in range(gpus):
        mean_s += (g.free[k] - last_free[k]) / gpus
    for k in range(gpus):
        spread += (g.free[k] - last_free[k] - mean_s) ** 2 / gpus
    return Played(time_s, np.sqrt(spread), upload_bytes / machine.iterations, excess, work)
