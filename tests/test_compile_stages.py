"""`compile_stages=True`: each distinct stage graph compiled once, results equal within rounding."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx import symbolic_trace

import rpcompile
from rpcompile.exporting import EXPORT_LOCK, deferred_code
from rpcompile.runtime.compiled_stages import CompiledStages, structure
from tests import models, reference

OPTIONS = {"gpus": 2, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}
COMPILER = shutil.which("c++") or shutil.which("g++")


def graph(function: object) -> torch.fx.GraphModule:
    return symbolic_trace(function)  # type: ignore[arg-type]


def test_structure_ignores_names_and_sees_everything_else() -> None:
    base = structure(graph(lambda a, b: torch.mul(a, b) + 2))
    assert structure(graph(lambda x, y: torch.mul(x, y) + 2)) == base
    for other in (
        lambda a, b: torch.mul(a, b) + 3,
        lambda a, b: torch.mul(b, a) + 2,
        lambda a, b: torch.add(a, b) + 2,
        lambda a, b: (torch.mul(a, b), 2),
        lambda a, b, c: torch.mul(a, b) + 2,
    ):
        assert structure(graph(other)) != base


def test_equal_stages_share_one_compiled_graph() -> None:
    compiled = CompiledStages("eager")
    first = compiled.of(graph(lambda a: a + 1))
    assert compiled.of(graph(lambda x: x + 1)) is first
    assert compiled.of(graph(lambda x: x + 2)) is not first
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")],
        ),
    ],
)
def test_loss_and_gradients_are_plain_pytorchs_within_rounding(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledStages.__init__, "__defaults__", (backend,))
    case = models.make("mlp")
    plain = copy.deepcopy(case.model)
    with rpcompile.compile(case.model, example_inputs=case.batch, compile_stages=True, **OPTIONS) as compiled:
        for _ in range(2):
            loss = compiled.forward_backward(**case.batch)
            expected = reference.forward_backward(plain, case.batch, 4, random=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_nothing_compiles_while_an_optimizer_steps() -> None:
    """Compiling sets a flag of the whole process, by which optimizers round differently."""
    stage = CompiledStages("eager").of(graph(lambda a: a + 1))
    held: list[bool] = []
    for _ in range(2):
        with stage.warming("forward"):
            held.append(EXPORT_LOCK.locked())
    assert held == [True, False]


def test_graphs_of_other_threads_get_their_code_during_an_export() -> None:
    with deferred_code():
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(graph, lambda a: a + 1).result()
        assert other(torch.ones(1)) == 2
        assert not hasattr(graph(lambda a: a + 1), "_code")
    assert graph(lambda a: a + 1)(torch.ones(1)) == 2
