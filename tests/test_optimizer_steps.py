"""`compiled.step` against `optimizer.step()`: every optimizer, clipping, hooks, reads and orders of calls."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

from rpcompile.errors import ExecutionError, InvalidArgument
from rpcompile.runtime.optimizer_subsets import SubsetStepper, is_separable
from tests import models, training

Make = Callable[[Any], optim.Optimizer]


class NormScaled(optim.Optimizer):
    """Divides by the norm of all gradients: one parameter's update depends on the others."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        held = [(g["lr"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([torch.ones(()), *(p.grad.norm() for _, p in held)]).norm()
        for lr, p in held:
            p.sub_(lr * p.grad / norm)


class Counting(optim.Optimizer):
    """Keeps scalars on itself and in its groups, as several optimizers outside torch do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / (group["k"] + self.calls) * p.grad)


class Listing(Counting):
    """Keeps a list that every step appends to."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.history: list[int] = []


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd-foreach-maximize": lambda p: optim.SGD(p, lr=0.1, foreach=True, maximize=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adamw-tensor-lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.01)),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, t0=1),
    "rprop": lambda p: optim.Rprop(p),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "muon": lambda p: optim.Muon([q for q in p if q.ndim == 2], lr=0.01),
    "counting": Counting,
    "not separable": NormScaled,
    "list attribute": Listing,
}
AT_ONCE = {"not separable", "list attribute"}


@pytest.fixture(scope="module")
def shared() -> Iterator[training.Pair]:
    found = training.pair()
    yield found
    found.compiled.close()


@pytest.fixture
def pair(shared: training.Pair) -> training.Pair:
    start = models.build(models.mlp).model.state_dict()
    for model in (shared.model, shared.plain):
        model.load_state_dict(start)
        model.zero_grad()
    return shared


def groups(model: nn.Module, make: Make) -> optim.Optimizer:
    """The optimizer over two groups, of which the second has another learning rate."""
    parameters = list(model.parameters())
    made = make(parameters[:4])
    second = [p for p in parameters[4:] if not isinstance(made, optim.Muon) or p.ndim == 2]
    lr = made.param_groups[0]["lr"]
    made.add_param_group({"params": second, "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr / 2})
    return made


def same_state(mine: optim.Optimizer, theirs: optim.Optimizer) -> None:
    mine_dict, theirs_dict = mine.state_dict(), theirs.state_dict()
    assert mine_dict["param_groups"] == theirs_dict["param_groups"]
    assert mine_dict["state"].keys() == theirs_dict["state"].keys()
    for index, state in theirs_dict["state"].items():
        for name, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(mine_dict["state"][index][name], value), (index, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_queued_steps_with_clipping_and_scheduler_equal_plain_steps(
    pair: training.Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.delay_host(monkeypatch, longest_s=0.002)
    mine, theirs = groups(pair.model, OPTIMIZERS[name]), groups(pair.plain, OPTIMIZERS[name])
    assert is_separable(mine) == (name not in AT_ONCE)
    schedulers = [optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in (mine, theirs)]
    for step in range(4):
        pair.forward_backward(step)
        if step != 1:
            norm = pair.compiled.clip_grad_norm_(0.2)
            assert torch.equal(norm, nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.2))
        pair.compiled.step(mine)
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
        if step != 2:
            mine.zero_grad(set_to_none=step != 0)
            theirs.zero_grad(set_to_none=step != 0)
    pair.assert_equal()
    same_state(mine, theirs)
    assert type(mine) is type(theirs)
    assert getattr(mine, "calls", None) == getattr(theirs, "calls", None)


def test_detection_sees_overrides_and_leaves_the_random_generator() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    before = torch.get_rng_state()
    assert is_separable(optim.AdamW(parameters))
    assert not is_separable(optim.LBFGS(parameters))
    assert not is_separable(optim.SparseAdam(parameters))
    assert not is_separable(optim.Adam(parameters, differentiable=True))
    wrapped = optim.SGD(parameters)
    wrapped.step = lambda: None  # type: ignore[method-assign]
    assert not is_separable(wrapped)
    assert torch.equal(torch.get_rng_state(), before)


def test_separability_is_asked_again_when_hyperparameters_change(pair: training.Pair) -> None:
    optimizer = optim.SGD(pair.model.parameters(), lr=0.1)
    pair.forward_backward(0)
    pair.compiled.step(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    seen: list[object] = []
    original = SubsetStepper.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubsetStepper, "__init__", lambda self, o: (seen.append(o), original(self, o))[1])
        pair.compiled.step(optimizer)
        assert len(seen) == 3  # two steps of the toy, one of the model
        pair.compiled.step(optimizer)
        assert len(seen) == 4


def test_hooks_fire_once_a_step_and_see_what_plain_hooks_see(
    pair: training.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.delay_host(monkeypatch)
    seen: dict[str, list[Any]] = {"mine": [], "theirs": []}
    made = {"mine": optim.Adam(pair.model.parameters()), "theirs": optim.Adam(pair.plain.parameters())}
    for key, optimizer in made.items():
        first = optimizer.param_groups[0]["params"][0]
        note = lambda *_, key=key, first=first: seen[key].append(first.detach().clone())  # noqa: E731
        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(note)
    for step in range(2):
        pair.forward_backward(step)
        pair.compiled.step(made["mine"])
        made["theirs"].step()
    assert len(seen["mine"]) == 4
    assert all(map(torch.equal, seen["mine"], seen["theirs"]))


# ------------------------------------------------------------------- reads


class Gate:
    """Holds the host queue until it is opened."""

    def __init__(self, compiled: Any) -> None:
        self._open = threading.Event()
        compiled._updates.queue.put((-1, 0), self._open.wait)

    def opened_by(self, read: Callable[[], Any]) -> Any:
        """Runs `read`, which has to wait for the queue, and opens it meanwhile."""
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(read()))
        thread.start()
        thread.join(0.05)
        waited = thread.is_alive()
        self._open.set()
        thread.join(20)
        assert waited, "it did not wait"
        return done[0]

    def passed_by(self, action: Callable[[], Any]) -> None:
        """Runs `action`, which must not wait."""
        thread = threading.Thread(target=action)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waited"
        self._open.set()


def under_way(pair: training.Pair, steps: int = 2) -> tuple[Gate, optim.Optimizer, optim.Optimizer]:
    """A step that is queued and cannot begin, and is over on the plain model."""
    mine, theirs = optim.Adam(pair.model.parameters(), 0.1), optim.Adam(pair.plain.parameters(), 0.1)
    for step in range(steps):
        pair.forward_backward(step)
        gate = Gate(pair.compiled) if step == steps - 1 else None
        pair.compiled.clip_grad_norm_(0.1)
        nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1)
        pair.compiled.step(mine)
        theirs.step()
    assert gate is not None
    return gate, mine, theirs


READS: dict[str, Callable[[nn.Module, optim.Optimizer], Any]] = {
    "operator": lambda m, o: m.layers[3].weight + 0,
    "data": lambda m, o: m.layers[3].weight.data.clone(),
    "numpy": lambda m, o: torch.from_numpy(m.layers[3].weight.detach().numpy().copy()),
    "gradient": lambda m, o: m.layers[3].weight.grad.clone(),
    "state_dict": lambda m, o: m.state_dict()["layers.3.weight"].clone(),
    "deepcopy": lambda m, o: copy.deepcopy(m).layers[3].weight.detach(),
    "pickle": lambda m, o: pickle.loads(pickle.dumps(m.layers[3].weight)).detach(),
    "forward": lambda m, o: m(torch.ones(2, 16), torch.zeros(2, dtype=torch.long)).detach(),
    "in place": lambda m, o: m.layers[3].weight.detach().mul_(2),
    "norm": lambda m, o: nn.utils.get_total_norm([p.grad for p in m.parameters()]),
    "optimizer.state": lambda m, o: o.state[m.layers[3].weight]["exp_avg"].clone(),
    "optimizer.state_dict": lambda m, o: o.state_dict()["state"][6]["exp_avg_sq"].clone(),
    "optimizer deepcopy": lambda m, o: copy.deepcopy(o).state_dict()["state"][6]["exp_avg_sq"],
    "plain step": lambda m, o: (o.step(), m.layers[3].weight.detach().clone())[1],
}


@pytest.mark.parametrize("read", READS)
def test_every_read_waits_for_the_step_and_sees_its_result(pair: training.Pair, read: str) -> None:
    gate, mine, theirs = under_way(pair)
    result = gate.opened_by(lambda: READS[read](pair.model, mine))
    assert torch.equal(result, READS[read](pair.plain, theirs))
    assert type(result) is torch.Tensor
    assert type(pair.model.layers[3].weight) is nn.Parameter


def test_a_state_tensor_held_since_before_is_guarded_too(pair: training.Pair) -> None:
    mine, theirs = optim.SGD(pair.model.parameters(), 0.1, 0.9), optim.SGD(pair.plain.parameters(), 0.1, 0.9)
    pair.forward_backward(0)
    pair.compiled.step(mine)
    theirs.step()
    kept = mine.state[pair.model.layers[0].bias]["momentum_buffer"]
    gate = Gate(pair.compiled)
    pair.compiled.step(mine)
    theirs.step()
    expected = theirs.state[pair.plain.layers[0].bias]["momentum_buffer"]
    assert torch.equal(gate.opened_by(kept.clone), expected)


def test_zero_grad_schedulers_and_shapes_do_not_wait(pair: training.Pair) -> None:
    gate, mine, theirs = under_way(pair)
    scheduler = optim.lr_scheduler.StepLR(mine, 1)

    def between_steps() -> None:
        mine.zero_grad()
        scheduler.step()
        assert all(p.requires_grad and p.shape and p.grad is None for p in pair.compiled.parameters())

    gate.passed_by(between_steps)
    theirs.zero_grad()
    pair.assert_equal()


def test_loading_waits_and_is_not_overwritten(pair: training.Pair) -> None:
    gate, mine, _ = under_way(pair)
    saved_optimizer = copy.deepcopy(optim.Adam(pair.plain.parameters(), 0.3).state_dict())
    start = models.build(models.mlp).model.state_dict()
    gate.opened_by(lambda: pair.compiled.load_state_dict(start))
    mine.load_state_dict(saved_optimizer)
    assert all(torch.equal(value, start[name]) for name, value in pair.model.state_dict().items())
    assert mine.param_groups[0]["lr"] == 0.3
    pair.plain.load_state_dict(start)
    pair.forward_backward(5)


def test_next_forward_starts_behind_the_updates_of_its_own_segments(pair: training.Pair) -> None:
    """The last segment's update begins when the first stage already computes."""
    mine, theirs = optim.Adam(pair.model.parameters(), 0.1), optim.Adam(pair.plain.parameters(), 0.1)
    pair.forward_backward(0)
    order: list[str] = []
    units = len(set(pair.compiled._weights.owners().values()))
    lock, first_done = threading.Lock(), threading.Event()
    original = SubsetStepper.step

    def noted(self: SubsetStepper, members: Any) -> None:
        if order.count("update") == units - 1 and not first_done.wait(10):
            raise TimeoutError("the first upload waits for more than its own segments")
        original(self, members)
        with lock:
            order.append("update")

    def instruction(text: str) -> None:
        if text == "0F0":
            with lock:
                order.append("0F0")
            first_done.set()

    engine = pair.compiled._training.engine
    engine.before_instruction = instruction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubsetStepper, "step", noted)
        patch.setattr("rpcompile.runtime.updates.is_separable", lambda _: True)
        pair.compiled.step(mine)
        theirs.step()
        pair.forward_backward(1)
    engine.before_instruction = None
    assert order.index("0F0") <= units - 1 == order.count("update") - 1
    pair.assert_equal()


# ------------------------------------------------------------------- failures


def test_failing_update_is_raised_once_by_the_next_call(pair: training.Pair) -> None:
    optimizer = optim.SGD(pair.model.parameters(), 0.1)
    pair.compiled.forward_backward(**pair.batch)
    original, calls = SubsetStepper.step, [0]

    def fails(self: SubsetStepper, members: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError("injected")
        original(self, members)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpcompile.runtime.updates.is_separable", lambda _: True)
        patch.setattr(SubsetStepper, "step", fails)
        pair.compiled.step(optimizer)
        with pytest.raises(ExecutionError, match=r"update of layers\.1.* failed: MemoryError: injected"):
            pair.compiled.forward_backward(**pair.batch)
    pair.compiled.wait()
    assert calls == [2]
    pair.compiled.forward_backward(**pair.batch)
    pair.compiled.step(optimizer)
    pair.compiled.wait()


def test_lbfgs_says_how_and_its_closure_works(pair: training.Pair) -> None:
    mine = optim.LBFGS(pair.model.parameters(), max_iter=3)
    theirs = optim.LBFGS(pair.plain.parameters(), max_iter=3)
    with pytest.raises(InvalidArgument, match=r"optimizer\.step\(closure\)"):
        pair.compiled.step(mine)

    def closure(optimizer: optim.Optimizer, call: Callable[..., torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        return call()

    mine.step(lambda: closure(mine, lambda: pair.compiled.forward_backward(**pair.batch)))
    theirs.step(lambda: closure(theirs, lambda: training.plain_forward_backward(pair.plain, pair.batch)))
    pair.assert_equal()


def test_sparse_adam_reports_its_own_error(pair: training.Pair) -> None:
    pair.compiled.forward_backward(**pair.batch)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        pair.compiled.step(optim.SparseAdam(list(pair.model.parameters())))


def test_two_optimizers_and_parameters_of_nobody(pair: training.Pair) -> None:
    strangers = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    made = []
    for model, stranger in zip((pair.model, pair.plain), strangers, strict=True):
        parameters = list(model.parameters())
        made.append([optim.SGD(parameters[:3], 0.1), optim.Adam([*parameters[3:], stranger], 0.1)])
        stranger.grad = torch.full((3,), 2.0)
    for step in range(2):
        pair.forward_backward(step)
        for mine, theirs in zip(*made, strict=True):
            pair.compiled.step(mine)
            theirs.step()
    assert torch.equal(*strangers)
    pair.assert_equal()


# ------------------------------------------------------------------- orders of calls


@pytest.mark.parametrize("seed", range(12))
def test_random_orders_of_calls_equal_the_same_calls_on_a_plain_model(
    pair: training.Pair, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.delay_host(monkeypatch, seed, 0.004)
    choices = random.Random(seed)
    make = OPTIMIZERS[choices.choice(["adamw-fused", "sgd-momentum", "adafactor", "rprop", "not separable"])]
    models_ = (pair.model, pair.plain)
    made = [make(model.parameters()) for model in models_]
    saved = [copy.deepcopy(model.state_dict()) for model in models_]

    def step() -> None:
        pair.compiled.step(made[0])
        made[1].step()

    def plain_step() -> None:
        for optimizer in made:
            optimizer.step()

    def clip(maximum: float) -> None:
        if pair.plain.layers[0].weight.grad is not None:
            norm = pair.compiled.clip_grad_norm_(maximum)
            assert torch.equal(norm, nn.utils.clip_grad_norm_(pair.plain.parameters(), maximum))

    def each(act: Callable[[nn.Module], Any]) -> None:
        for model in models_:
            with torch.no_grad():
                act(model)

    def save() -> None:
        saved[:] = [{k: v.clone() for k, v in model.state_dict().items()} for model in models_]

    def load() -> None:
        for model, state in zip(models_, saved, strict=True):
            model.load_state_dict(state)

    def reload_optimizer() -> None:
        for optimizer in made:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def zero_grad(to_none: bool) -> None:
        for optimizer in made:
            optimizer.zero_grad(set_to_none=to_none)

    calls: list[Callable[[], None]] = [
        lambda: pair.forward_backward(choices.randrange(50)),
        step,
        lambda: zero_grad(choices.random() < 0.7),
        lambda: clip(choices.choice([0.05, 10.0])),
        plain_step,
        lambda: each(lambda model: model.layers[1].weight.mul_(0.9)),
        lambda: each(lambda model: model.layers[2].bias.data.add_(0.01)),
        lambda: each(lambda model: setattr(model.layers[0].weight, "data", model.layers[0].weight.clone())),
        pair.assert_equal,
        save,
        load,
        reload_optimizer,
    ]
    weights = [8, 6, 4, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    for _ in range(30):
        choices.choices(calls, weights)[0]()
    pair.assert_equal()


def test_an_export_meanwhile_changes_no_bit(pair: training.Pair) -> None:
    """torch.export sets a process-wide flag by which AdamW would round its bias corrections differently."""
    mine, theirs = optim.AdamW(pair.model.parameters(), 0.1), optim.AdamW(pair.plain.parameters(), 0.1)
    for step in range(4):
        pair.forward_backward(step)
        pair.compiled.step(mine)
        theirs.step()
        training.pair().compiled.close()
        pair.assert_equal()


def test_compiling_the_model_again_waits_for_its_updates(pair: training.Pair) -> None:
    gate, _, _ = under_way(pair)
    case = models.Case(pair.model, pair.batch)
    again = gate.opened_by(lambda: training.compile_case(case, "mlp"))
    assert torch.equal(again.forward_backward(**pair.batch), pair.compiled.forward_backward(**pair.batch))
    again.close()
