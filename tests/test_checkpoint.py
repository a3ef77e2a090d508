"""Checkpoints: what is resumed, what is refused, what survives a crash."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import rpcompile
from rpcompile import checkpoint
from rpcompile.errors import CheckpointError
from tests import models, training

ROOT = Path(__file__).parents[1]
Scheduler = optim.lr_scheduler.LRScheduler


def dropout_mlp() -> models.Case:
    """Layers with dropout, BatchNorm's buffers and a tied weight."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 5)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.2, self.training)
            return nn.functional.cross_entropy(self.last(self.second(h).relu()), y)

    return models.Case(Model(), models.mlp().batch)


def plain_dropout_mlp() -> models.Case:
    """The same without a tied weight and BatchNorm."""
    case = dropout_mlp()
    case.model.second.weight = nn.Parameter(case.model.first.weight.detach().clone())
    case.model.norm = nn.Identity()
    return case


def make(
    gpus: int, factory: Callable[[], models.Case] = dropout_mlp, **options: Any
) -> tuple[rpcompile.Compiled, optim.Optimizer, Scheduler, dict[str, Any]]:
    case = models.build(factory)
    compiled = rpcompile.compile(
        case.model,
        gpus=gpus,
        microbatches=4,
        example_inputs=case.batch,
        gpu=models.SLOW_GPU,
        solver_time_s=0.3,
        effort=None,
        **options,
    )
    optimizer = optim.AdamW(compiled.parameters(), lr=0.02, amsgrad=True)
    return compiled, optimizer, optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20), case.batch


def train(
    parts: tuple[rpcompile.Compiled, optim.Optimizer, Scheduler, dict[str, Any]], steps: int
) -> list[float]:
    compiled, optimizer, scheduler, batch = parts
    losses = []
    for _ in range(steps):
        losses.append(compiled.forward_backward(**batch).item())
        compiled.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("factory", "gpus"), [(dropout_mlp, 2), (plain_dropout_mlp, 3)])
def test_resumed_training_equals_uninterrupted_training(
    factory: Callable[[], models.Case], gpus: int, tmp_path: Path
) -> None:
    """Bit for bit; with a tied weight on the same plan, for its gradient is summed by stages."""
    torch.manual_seed(11)
    through = make(2, factory)
    expected = train(through, 3)
    through[0].save_checkpoint(tmp_path / "c", through[1], through[2])
    expected += train(through, 3)
    resumed = make(gpus, factory, plan=through[0].plan if gpus == 2 else None)
    torch.manual_seed(99)
    resumed[0].load_checkpoint(tmp_path / "c", resumed[1], resumed[2])
    assert train(resumed, 3) == expected[3:]
    for (name, mine), theirs in zip(
        resumed[0].state_dict().items(), through[0].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert (resumed[0].model.second.weight is resumed[0].model.first.weight) == (factory is dropout_mlp)
    for parts in (through, resumed):
        parts[0].close()


def test_async_saves_all_updates_and_resumes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make(2, models.mlp, mode="async", compute_dtype=torch.bfloat16)
    training.delay_host(monkeypatch)
    train(parts, 2)
    parts[0].save_checkpoint(tmp_path, parts[1])
    saved = {name: value.clone() for name, value in parts[0].state_dict().items()}
    train(parts, 1)
    parts[0].load_checkpoint(tmp_path, parts[1])
    assert all(torch.equal(value, saved[name]) for name, value in parts[0].state_dict().items())
    assert {value.dtype for value in saved.values()} == {torch.float32}
    parts[0].close()


def test_save_pretrained_writes_the_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3ForCausalLM

    case = models.make("qwen3-tied")
    training.delay_host(monkeypatch)
    with training.compile_case(case, "qwen3-tied") as compiled:
        optimizer = optim.AdamW(compiled.parameters(), lr=0.01)
        before = case.model.model.norm.weight.detach().clone()
        compiled.forward_backward(**case.batch)
        compiled.step(optimizer)
        case.model.save_pretrained(tmp_path)
        loaded = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.model.norm.weight, before)
    for mine, theirs in zip(case.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ------------------------------------------------------------------- values


def schedulers(optimizer: optim.Optimizer) -> list[Scheduler]:
    kinds = optim.lr_scheduler
    return [
        kinds.MultiStepLR(optimizer, [1, 2, 2]),
        kinds.CosineAnnealingWarmRestarts(optimizer, 3),
        kinds.SequentialLR(
            optimizer, [kinds.LinearLR(optimizer), kinds.ExponentialLR(optimizer, 0.9)], milestones=[2]
        ),
        kinds.LambdaLR(optimizer, lambda step: 0.9**step),
        kinds.ReduceLROnPlateau(optimizer),
    ]


@pytest.mark.parametrize("index", range(5))
def test_schedulers_go_on_where_they_were(index: int, tmp_path: Path) -> None:
    def made() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
        return optimizer, schedulers(optimizer)[index]

    def advance(optimizer: optim.Optimizer, scheduler: Any) -> float:
        optimizer.step()
        scheduler.step(*([1.0] if index == 4 else []))
        return optimizer.param_groups[0]["lr"]

    one, other = made(), made()
    advance(*one)
    checkpoint.save(tmp_path, {"optimizer": one[0], "scheduler": one[1]})
    checkpoint.load(tmp_path, {"optimizer": other[0], "scheduler": other[1]})
    assert other[1].state_dict() == one[1].state_dict()
    assert [advance(*one) for _ in range(4)] == [advance(*other) for _ in range(4)]


def test_values_keep_their_types_and_shared_memory_is_written_once(tmp_path: Path) -> None:
    class Holder:
        def __init__(self, state: Any) -> None:
            self.state = state

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    base = torch.arange(6.0)
    state = {
        "pair": (0.9, [1, None, True]),
        3: {"nan": float("inf"), "step": torch.tensor(4.0)},
        "same": base,
        "again": base,
        "view": base[2:4],
        "half": torch.ones(3, dtype=torch.bfloat16).expand(2, 3),
        "empty": torch.zeros(0),
    }
    checkpoint.save(tmp_path, {"holder": Holder(state)})
    loaded = Holder(None)
    checkpoint.load(tmp_path, {"holder": loaded})
    assert loaded.state["pair"] == (0.9, [1, None, True])
    assert loaded.state[3]["nan"] == float("inf")
    for name in ("same", "again", "view", "half", "empty"):
        assert torch.equal(loaded.state[name], state[name]), name
        assert loaded.state[name].dtype == state[name].dtype
    with pytest.raises(CheckpointError, match=r"holder\.3 is a function, which a checkpoint cannot hold"):
        checkpoint.save(tmp_path, {"holder": Holder({3: make})})
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------- what does not fit


def model_and_optimizer(width: int = 3, kind: type = optim.AdamW) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    optimizer = kind(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def damage_index(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("{")


def damage_tensors(folder: Path) -> None:
    next(folder.glob("*/optimizer.safetensors")).write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def newer(folder: Path) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**index, "version": 9}))


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "parts", "message"),
    [
        (
            nothing,
            lambda: model_and_optimizer(5),
            r"of another model than Sequential: it has 0\.weight \(3, 4\) ",
        ),
        (
            nothing,
            lambda: {"model": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))},
            r"it lacks 2\.bias, 2\.weight; it also has 1\.bias, 1\.weight",
        ),
        (
            nothing,
            lambda: model_and_optimizer(kind=optim.SGD),
            "optimizer is AdamW, not SGD; make the same one",
        ),
        (nothing, lambda: {"scheduler": nn.Linear(1, 1)}, r"has no scheduler, only \['model', 'optimizer'\]"),
        (
            nothing,
            lambda: {"optimizer": optim.AdamW([nn.Parameter(torch.ones(2))])},
            r"groups of \[4\] parameters, this one of \[1\]",
        ),
        (damage_index, model_and_optimizer, "checkpoint.json is damaged"),
        (damage_tensors, model_and_optimizer, "the checkpoint is damaged"),
        (newer, model_and_optimizer, "version is 9, this rpcompile reads 1"),
    ],
)
def test_what_does_not_fit_is_said_and_changes_nothing(
    harm: Callable[[Path], None], parts: Callable[[], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, model_and_optimizer())
    harm(tmp_path)
    into = parts()
    before = {name: str(part.state_dict()) for name, part in into.items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, into)
    assert {name: str(part.state_dict()) for name, part in into.items()} == before


def test_missing_checkpoint_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere: there is no checkpoint: No such file.*checkpoint\.json"
    ):
        checkpoint.load(tmp_path / "nowhere", model_and_optimizer())


# ------------------------------------------------------------------- crashes


@pytest.mark.parametrize("place", ["save_file", "write_in_one_step", "_synchronise"])
def test_full_disk_leaves_the_old_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, model_and_optimizer())
    expected = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, place, full)
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: .*No space left.*as it was"):
            checkpoint.save(tmp_path, model_and_optimizer())
    assert sorted(tmp_path.rglob("*")) == expected
    checkpoint.load(tmp_path, model_and_optimizer())


@pytest.mark.parametrize("calls", [1, 3])
def test_killed_process_leaves_the_old_checkpoint_and_the_next_save_cleans_up(
    calls: int, tmp_path: Path
) -> None:
    parts = model_and_optimizer()
    checkpoint.save(tmp_path, parts)
    program = f"""
import os, signal, sys
import torch
from torch import nn
from rpcompile import checkpoint
synchronise, count = checkpoint._synchronise, [0]
def kill(path):
    synchronise(path)
    count[0] += 1
    if count[0] == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint._synchronise = kill
checkpoint.save(sys.argv[1], {{"model": nn.Linear(4, 3)}})
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    other = model_and_optimizer()
    with torch.no_grad():
        other["model"][0].weight.zero_()
    checkpoint.load(tmp_path, other)
    assert torch.equal(other["model"][0].weight, parts["model"][0].weight)
    checkpoint.save(tmp_path, parts)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
