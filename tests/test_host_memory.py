"""Host memory: slots for downloads, arenas for weights."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.ir import Op
from rpcompile.runtime.engine import Engine, _pinned
from rpcompile.runtime.host_slots import HostSlots, allocate
from rpcompile.runtime.weight_arenas import CHUNK_BYTES, WeightArenas, copy_in_chunks
from tests import models
from tests.test_faults import live_bytes

CPU = torch.device("cpu")
NAMES = ["host:x.s3.m0", "host:x.s3.m1", "host:dx.s3.j4.m0", "host:gradients.j4.s3", "host:weights.s3"]


def pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# --------------------------------------------------------------------- slots


def test_boundaries_of_one_segment_share_an_arena_with_a_slot_each_that_stays() -> None:
    slots = HostSlots(NAMES, pin=False)
    slots.begin("sizes")
    value = {"h": torch.zeros(2, 3), "mask": torch.zeros(2, dtype=torch.bool)}
    first, second = (slots.empty_like(f"host:x.s3.m{m}", value) for m in range(2))
    other = slots.empty_like("host:dx.s3.j4.m0", value)
    assert pointer(first["h"]) == pointer(first["mask"]) == pointer(second["h"]) != pointer(other["h"])
    for index, tensor in enumerate([*first.values(), *second.values()]):
        tensor.fill_(index)
    assert [float(t.float().sum()) for t in (*first.values(), *second.values())] == [0, 2, 12, 2]
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in value.items()}
    slots.begin("sizes")
    assert slots.empty_like("host:x.s3.m1", value)["h"].data_ptr() == second["h"].data_ptr()
    nbytes = slots.nbytes
    slots.begin("larger")
    assert slots.empty_like("host:x.s3.m1", {"h": torch.zeros(200, 3)})["h"].shape == (200, 3)
    assert slots.nbytes > nbytes


def test_slots_keep_memory_formats_as_clone_does() -> None:
    slots = HostSlots(NAMES, pin=False)
    image = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    turned, wide = torch.zeros(3, 4).t(), torch.zeros(3, 1).expand(3, 4)
    made = slots.empty_like("host:x.s3.m0", {"image": image, "turned": turned, "wide": wide})
    for name, tensor in (("image", image), ("turned", turned), ("wide", wide)):
        assert made[name].stride() == tensor.clone().stride()


def test_a_microbatch_larger_than_the_first_gets_a_slot_of_its_own() -> None:
    slots = HostSlots(NAMES, pin=False)
    small = slots.empty_like("host:x.s3.m1", {"h": torch.zeros(2)})
    large = slots.empty_like("host:x.s3.m0", {"h": torch.zeros(2000)})
    large["h"].fill_(1)
    small["h"].fill_(0)
    assert large["h"].sum() == 2000


def test_gradient_arenas_are_used_again_only_when_nobody_holds_them() -> None:
    slots = HostSlots(NAMES, pin=False)
    like = {"w": torch.zeros(4), "b": torch.zeros(2)}
    first = slots.empty_like("host:gradients.j4.s3", like)
    held = first["b"][:1].numpy()  # a view that only the storage knows of
    address, nbytes = first["w"].data_ptr(), slots.nbytes
    del first
    second = slots.empty_like("host:gradients.j4.s3", like)
    assert second["w"].data_ptr() != address
    assert slots.nbytes == 2 * nbytes
    del held, second
    gc.collect()
    third = slots.empty_like("host:gradients.j4.s3", like)
    assert slots.nbytes == nbytes
    del third


def test_allocations_are_page_aligned_and_not_rounded_up() -> None:
    flat = allocate(1_000_001, pin=False)
    assert flat.nbytes == 1_000_001
    assert flat.data_ptr() % 4096 == 0


class Runtime:
    """Stands in for CUDA's runtime: notes what is registered, or refuses."""

    def __init__(self, code: int = 0) -> None:
        self._code = code
        self.registered: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if self._code == 0:
            self.registered[pointer] = nbytes, flags
        return self._code

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.registered[pointer]
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error {code}"


def test_pinned_memory_is_registered_for_all_devices_until_nobody_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    flat = allocate(1_000_001, pin=True)
    portable = 1
    assert runtime.registered == {flat.data_ptr(): (1_000_001, portable)}
    view = flat[10:20].view(5, 2)
    del flat
    gc.collect()
    assert len(runtime.registered) == 1
    del view
    gc.collect()
    assert runtime.registered == {}
    assert allocate(0, pin=True).numel() == 0


def test_pages_of_pinned_memory_stay_the_same_when_the_process_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private pages would be copied at the next write, and the device go on with the old ones."""
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    flat = allocate(4096, pin=True)
    flat[0] = 1
    byte = ctypes.c_ubyte.from_address(flat.data_ptr())
    written = os.pipe()
    child = os.fork()
    if child == 0:  # as little as can be: the test's threads are not here
        os.read(written[0], 1)
        os._exit(byte.value)
    flat[0] = 7
    os.write(written[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for end in written:
        os.close(end)


def test_memory_that_cannot_be_pinned_works_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(2))
    kernels: list[str] = []

    def kernel(*_: object, device: str) -> None:
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")  # the one that the registration left behind

    monkeypatch.setattr(torch, "zeros", kernel)
    with pytest.warns(
        RuntimeWarning, match=r"cannot pin 4,096 bytes of host memory \(error 2\); .*lock more"
    ):
        flat = allocate(4096, pin=True)
    assert kernels == ["cuda"]
    flat.fill_(3)
    assert flat.sum() == 3 * 4096


def test_inputs_are_pinned_without_gaps_or_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like

    def unpinned(tensor: torch.Tensor, pin_memory: bool = False, **options: object) -> torch.Tensor:
        assert pin_memory or options == {"device": "meta"}
        return empty_like(tensor, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "empty_like", unpinned)
    row = torch.arange(4)
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for given, stride in (
        (row.expand(3, 4), (4, 1)),
        (torch.rand(6, 8)[:, ::2], (4, 1)),
        (image, image.stride()),
        (torch.tensor(2.5), ()),
    ):
        made = _pinned(given)
        assert torch.equal(made, given)
        assert made.stride() == stride
        assert made.data_ptr() != given.data_ptr()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    assert _pinned(image) is image
    assert _pinned(row.expand(3, 4)).stride() == (4, 1)


# --------------------------------------------------------------------- arenas


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def test_weights_become_views_of_one_arena_a_segment_and_train_as_before() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    tensors = named(model)
    groups = [[name for name in tensors if name[0] in "01"], [name for name in tensors if name[0] == "2"]]
    arenas = WeightArenas(adopt=True)
    arenas.refresh(groups, tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert pointer(model[0].weight) == pointer(model[1].bias) != pointer(model[1].running_mean)
    assert pointer(model[2].bias) != pointer(model[2].weight)
    model(torch.randn(5, 3)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    arenas.refresh(groups, tensors)
    up = arenas.upload({name: tensors[name] for name in groups[0]}, CPU)
    assert all(torch.equal(value, tensors[name]) for name, value in up.items())
    assert not torch.equal(up["0.weight"], before["0.weight"])


def test_only_bulk_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's copy engine lets other streams' copies in between pieces, and activations must not wait."""
    case = models.make("mlp")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, gpus=1, microbatches=2)
    monkeypatch.setattr("rpcompile.runtime.weight_arenas.CHUNK_BYTES", 64)
    copied: dict[str, list[int]] = {}
    running = threading.local()
    copy_ = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.setdefault(getattr(running, "instruction", ""), []).append(source.nbytes)
        return copy_(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    compiled._training.engine.before_instruction = lambda text: setattr(running, "instruction", text)
    compiled.forward_backward(**case.batch)
    actions = {action.id: action for action in compiled.plan.schedule.actions()}
    moved = {actions[id].op: sizes for id, sizes in copied.items() if id in actions}
    assert max(moved[Op.PREFETCH]) == max(moved[Op.GRADIENT]) == 64
    assert max(moved[Op.LOAD]) > 64
    monkeypatch.undo()
    compiled.close()


def test_pieces_make_up_the_whole() -> None:
    source = torch.randn(3, CHUNK_BYTES // 8)
    for tensor in (source, source.T, source[:, ::2], source[0, :5]):
        target = torch.zeros_like(tensor)
        copy_in_chunks(target, tensor)
        assert torch.equal(target, tensor)


def test_upload_is_few_large_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
    arenas = WeightArenas(adopt=True)
    tensors = named(model)
    arenas.refresh([list(tensors)], tensors)
    monkeypatch.setattr("rpcompile.runtime.weight_arenas.CHUNK_BYTES", CHUNK_BYTES // 2)
    copies: list[int] = []
    copy_ = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copies.append(source.nbytes)
        return copy_(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    up = arenas.upload(tensors, CPU)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(tensors) == 40
    assert len(copies) == -(-total // (CHUNK_BYTES // 2)) == 3
    monkeypatch.undo()
    assert all(torch.equal(up[name], tensor) for name, tensor in tensors.items())


def test_an_update_of_one_uploaded_tensor_is_none_of_another_for_autograd() -> None:
    model = nn.BatchNorm1d(4)
    tensors = named(model)
    arenas = WeightArenas(adopt=True)
    arenas.refresh([list(tensors)], tensors)
    up = arenas.upload(tensors, CPU)
    weight = up["weight"].requires_grad_(True)
    loss = (weight * weight).sum()
    up["bias"].add_(1)
    loss.backward()
    assert torch.equal(weight.grad, 2 * weight.detach())


def test_weights_that_others_look_at_are_copied_instead() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    alias = model[0].weight.detach()
    address = alias.data_ptr()
    tensors = named(model)
    arenas = WeightArenas(adopt=True)
    arenas.refresh([list(tensors)], tensors)
    assert model[0].weight.data_ptr() == address
    assert pointer(model[1].weight) != address
    alias.fill_(7)
    arenas.refresh([list(tensors)], tensors)
    assert torch.equal(arenas.upload(tensors, CPU)["0.weight"], torch.full((3, 3), 7.0))


def test_tied_weights_lie_in_an_arena_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    tensors = named(model)
    arenas = WeightArenas(adopt=True)
    arenas.refresh([["0.weight"], ["1.weight"]], tensors)
    assert model[0].weight is model[1].weight
    up = arenas.upload(tensors, CPU)
    assert torch.equal(up["0.weight"], up["1.weight"])
    assert model[0].weight.untyped_storage().nbytes() < 2 * 256


def test_replaced_weights_are_found() -> None:
    model = nn.Linear(3, 3)
    arenas = WeightArenas(adopt=True)
    arenas.refresh([["weight", "bias"]], named(model))
    model.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.zeros(3)}, assign=True)
    arenas.refresh([["weight", "bias"]], named(model))
    assert torch.equal(arenas.upload(named(model), CPU)["weight"], torch.ones(3, 3))


def test_memory_mapped_weights_stay_so_without_arenas_and_move_with_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in nn.Linear(64, 64).state_dict().items()}, path)
    for adopt in (False, True):
        model = nn.Linear(64, 64)
        model.load_state_dict(load_file(path), assign=True)
        gc.collect()
        tensors = named(model)
        where = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        arenas = WeightArenas(adopt=adopt)
        arenas.refresh([list(tensors)], tensors)
        stayed = {name: tensor.data_ptr() for name, tensor in tensors.items()} == where
        assert stayed is not adopt
        up = arenas.upload(tensors, CPU)
        assert all(torch.equal(up[name], value) for name, value in load_file(path).items())


# --------------------------------------------------------------------- whole iterations


@pytest.mark.parametrize("family", ["qwen3-tied", "unet-batchnorm"])
def test_arenas_change_no_bit(family: str) -> None:
    case = models.make(family)
    options = {"gpus": 2, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU}
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **options)
    start = copy.deepcopy(case.model.state_dict())
    results = []
    for adopt in (False, True):
        engine = Engine(compiled.program, compiled.plan.chain, arenas=WeightArenas(adopt=adopt))
        object.__setattr__(compiled._training, "engine", engine)
        case.model.load_state_dict(start)
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
        torch.manual_seed(3)
        for _ in range(2):
            compiled.forward_backward(**case.batch)
            compiled.step(optimizer)
            optimizer.zero_grad()
        results.append(copy.deepcopy(case.model.state_dict()))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_neither_bytes_nor_objects_grow_from_step_to_step() -> None:
    case = models.make("mlp")
    compiled = rpcompile.compile(
        case.model, example_inputs=case.batch, gpus=2, microbatches=4, gpu=models.SLOW_GPU
    )
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    slots = compiled._training.engine._bays[0].slots
    found, objects = [], []
    for step in range(30):
        compiled.forward_backward(**case.batch)
        compiled.step(optimizer)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        if step % 6 == 5:
            found.append((live_bytes(), slots.nbytes))
            objects.append(len(gc.get_objects()))
    assert len(set(found[1:])) == 1, found
    assert objects[-1] - objects[1] < 18, objects  # less than one a step
    compiled.close()


def test_a_plan_with_replicas_says_what_its_downloads_take(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HostSlots] = []

    class Noted(HostSlots):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("rpcompile.runtime.engine.HostSlots", Noted)
    model = models.Mlp(*[256] * 7)
    batch = {"x": torch.randn(64, 256), "y": torch.randint(256, (64,))}
    with rpcompile.compile(model, gpus=4, microbatches=8, example_inputs=batch) as compiled:
        host = compiled.plan.prediction.host
        assert host is not None
        for _ in range(2):
            compiled.forward_backward(**batch)
            model.zero_grad()
    assert host.partial_bytes > 0, "no stage was replicated: the test needs another model"
    assert made[0].nbytes == host.gradient_bytes + host.partial_bytes + host.boundary_bytes
