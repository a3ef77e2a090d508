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
    """

    time_s: float
    idle_s: float
    upload_bytes: float
    excess_bytes: float


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def play(
    machine: Machine,
    stages: Stages,
    gpu_of: np.ndarray,
    wanted: np.ndarray,
    order: np.ndarray,
    ends: np.ndarray,
) -> Played:
    """Plays a dispatch; where `wanted` is not 0, it deals that many jobs out first.

    Args:
        machine: What it runs on.
        stages: Costs, in the order of execution.
        gpu_of: (stages, microbatches) GPU of each; rewritten for stages that are dealt out.
        wanted: (stages,) number of GPUs to deal a stage out to, 0 to keep `gpu_of`.
        order: (stages, microbatches) filled with the microbatches in the order they arrive.
        ends: (stages, microbatches) filled with the end of each, in the last iteration.
    """
    count, microbatches = gpu_of.shape
    sets = min(2, microbatches)  # microbatches whose copies a GPU holds at once
    gpus = machine.speed.size
    left = np.full(SLICES, machine.host_bytes_per_s * machine.slice_s)
    free, before, uploaded = np.zeros(gpus), np.zeros(gpus), np.zeros(gpus)
    sent, sent_before, busy = np.zeros(gpus), np.zeros(gpus), np.zeros(gpus)
    lands, load = np.zeros(gpus), np.zeros(gpus)
    memory, gradients = np.zeros(gpus), np.zeros(gpus)  # of the job before
    load_before, store_before = np.zeros(gpus), np.zeros(gpus)
    ready = np.zeros(microbatches)
    came = np.empty(microbatches, np.int64)
    line = np.arange(microbatches)
    at = np.empty(microbatches, np.int64)  # the GPU of each in this stage
    took = np.empty(gpus)  # seconds of a microbatch of this stage on each GPU
    speed, limit, slice_s = machine.speed, machine.limit_bytes, machine.slice_s
    chosen = np.zeros(gpus, np.int64)
    jobs, here = np.zeros(gpus, np.int64), np.zeros(gpus, np.int64)
    last_free = np.zeros(gpus)
    final = final_before = updated = upload_bytes = excess = 0.0
    chained, dealt_jobs, settled = machine.iterations > 1, 0, 0.0
    for iteration in range(machine.iterations):
        ready[:] = 0.0
        came[:] = -1
        last_free[:] = free
        shift = iteration * dealt_jobs % gpus if machine.ring else 0
        if iteration == machine.iterations // 2:
            settled = free.mean()
        # An upload waits for the update of the iteration two before, or of the one before (time 0).
        if iteration >= 2:
            updated = max(updated, final_before)
        waits = iteration >= 2 if chained else machine.update_s_per_byte > 0.0
        final_before = final
        for s in range(count):
            nbytes, compute, ahead = stages.weight_bytes[s], stages.compute_s[s], stages.ahead_s[s]
            hop_s, handed, gradient = stages.hop_s[s], stages.handed_bytes[s], stages.gradient_bytes[s]
            saved_by, saved_hop_s = stages.saved_by[s], stages.saved_hop_s[s]
            for g in range(gpus):
                took[g] = compute / speed[g]
            released = 0.0
            if waits:
                work = stages.updated_bytes[s] * machine.update_s_per_byte * machine.host_bytes_per_s
                updated = _draw(left, slice_s, updated, work, machine.host_bytes_per_s)
                released = updated
            dealt = wanted[s] > 0 and iteration == 0
            width = min(wanted[s], gpus) if stages.lingering_bytes[s] == 0.0 else min(wanted[s], 1)
            if dealt and machine.ring:
                for i in range(microbatches):
                    gpu_of[s, i] = (dealt_jobs + i % width) % gpus
            elif dealt:
                # The GPUs that are free first, or have least to do where iterations are chained.
                for g in range(gpus):
                    lands[g] = max(max(uploaded[g], before[g]) + nbytes / machine.up_bytes_per_s, free[g])
                    if chained:
                        lands[g] = load[g]
                    chosen[g] = g
                for i in range(width):
                    for k in range(i + 1, gpus):
                        if lands[chosen[k]] < lands[chosen[i]]:
                            chosen[i], chosen[k] = chosen[k], chosen[i]
            # Microbatches in the order they arrive; nearly sorted already.
            for i in range(1, microbatches):
                m, k = line[i], i - 1
                while k >= 0 and ready[line[k]] > ready[m]:
                    line[k + 1] = line[k]
                    k -= 1
                line[k + 1] = m
            jobs[:] = 0
            here[:] = 0
            if dealt and not machine.ring:
                for i in range(width):
                    g = chosen[i]
                    if not chained:
                        lands[g] = max(lands[g], free[g])
                for i in range(microbatches):
                    m = line[i]
                    best, least = chosen[0], np.inf
                    for k in range(width):
                        g = chosen[k]
                        end = lands[g] + took[g]
                        if not chained:
                            hop = 0.0 if came[m] == g or came[m] < 0 else hop_s
                            since = ready[m] + hop - ahead / speed[g]
                            end = max(lands[g], since) + took[g]
                        if end < least:
                            best, least = g, end
                    lands[best] = least
                    if chained:
                        load[best] = least
                    gpu_of[s, m] = best
            for m in range(microbatches):
                g = gpu_of[s, m] + shift
                if g >= gpus:
                    g -= gpus
                at[m] = g
                jobs[g] += 1
                if came[m] == g:
                    here[g] += 1
            parts, seen, arrived = 0, 0, 0.0
            for g in range(gpus):
                if jobs[g] == 0:
                    continue
                parts += 1
                dealt_jobs += 1 if iteration == 0 else 0
                # What `StageCosts.resident_bytes` has: of the job before with what comes for this one, and
                # of this one with what the job before leaves behind.
                loaded, stored = stages.loaded_bytes[s], stages.stored_bytes[s]
                ahead_bytes = nbytes + max(0.0, loaded - (sets - 1) * load_before[g])
                excess = max(excess, memory[g] + ahead_bytes - limit[g])
                # What was made right here waits in place; the sets of copies are for the others.
                copies = min(sets, jobs[g] - here[g]) - sets
                own = stages.memory_bytes[s] + sets * stages.kept_bytes[s] + (here[g] + copies) * handed
                own += gradients[g] + max(0.0, store_before[g] - (sets - 1) * stored)
                excess = max(excess, own - limit[g])
                memory[g], gradients[g], load_before[g], store_before[g] = own, gradient, loaded, stored
                gate = free[g]
                if nbytes > 0.0:
                    begin = max(max(uploaded[g], before[g]), released) + machine.latency_s
                    rate = machine.up_bytes_per_s * (1.0 - busy[g])
                    uploaded[g] = _draw(left, slice_s, begin, nbytes, rate)
                    gate = max(gate, uploaded[g])
                    upload_bytes += nbytes
                if gradient > 0.0:
                    gate = max(gate, sent_before[g])
                before[g] = free[g]
                free[g] = gate
            for i in range(microbatches):
                m = line[i]
                g = at[m]
                start = free[g]
                if saved_by >= 0:
                    start = max(start, ends[saved_by, m] + saved_hop_s)
                since = ready[m] - ahead / speed[g]
                if came[m] != g and came[m] >= 0:
                    since += hop_s
                    k = int(start / slice_s)
                    if k < left.size:
                        left[k] = max(0.0, left[k] - 2.0 * handed)
                end = max(start, since) + took[g]
                free[g] = ready[m] = ends[s, m] = end
                came[m] = g
                order[s, i] = m
            for g in range(gpus):
                if jobs[g] == 0:
                    continue
                loaded = stages.loaded_bytes[s] - handed * here[g] / jobs[g]
                spent = took[g] * machine.up_bytes_per_s
                busy[g] = min(_HANDED, loaded / spent) if spent > 0.0 else 0.0
                if gradient > 0.0:
                    begin = max(sent[g], free[g]) + machine.latency_s
                    sent_before[g] = sent[g]
                    sent[g] = _draw(left, slice_s, begin, gradient, machine.down_bytes_per_s)
                    seen += 1
                    # A pass over memory reads the sum and what has landed, and writes the sum; the norm
                    # of the whole is one more to read.
                    passes = 0.0 if seen == 1 else 1.0 if sent[g] <= arrived and seen > 2 else 3.0
                    passes += 1.0 if seen == parts > 1 and machine.update_s_per_byte > 0.0 else 0.0
                    work = passes * gradient
                    arrived = max(arrived, sent[g])
                    arrived = _draw(left, slice_s, arrived, work, machine.host_bytes_per_s)
                final = max(final, free[g])
            if parts > 1 and stages.lingering_bytes[s] > 0.0:
                excess = max(excess, machine.limit_bytes.max())
            final = max(final, arrived)
    time_s, idle_s = final, final - free.mean()
    if chained:
        time_s = 0.0
        for g in range(gpus):
            time_s = max(time_s, free[g] - last_free[g])
        idle_s = float(np.std(free - last_free))
        if machine.ring:
            time_s = (free.mean() - settled) / (machine.iterations - machine.iterations // 2)
            idle_s = 0.0
    return Played(time_s, idle_s, upload_bytes / machine.iterations, max(0.0, excess))
