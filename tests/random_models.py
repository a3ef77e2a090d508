"""Random modules: straight-line programs of operators over a pool of tensors of shape (batch, up to W).

Every step reads tensors of the pool and adds what it makes to it, or changes one in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.models import BATCH, Case

if TYPE_CHECKING:
    from collections.abc import Callable

W = 6
CLASSES = 5


@dataclass(frozen=True)
class Step:
    """One operator: its name in `OPERATORS`, the pool entries it reads (from the end), and a number."""

    name: str
    a: int = 0
    b: int = 0
    n: int = 0


class RandomModel(nn.Module):
    """Runs steps; the loss is the mean square of the pool's last `kept` tensors plus a cross entropy."""

    def __init__(self, steps: tuple[Step, ...], kept: int = 3) -> None:
        super().__init__()
        self.steps, self.kept = steps, kept
        self.first, self.head = nn.Linear(W, W), nn.Linear(W, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.layers[1].requires_grad_(False)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, W))
        self.norm, self.batch_norm = nn.LayerNorm(W), nn.BatchNorm1d(W)
        self.table = nn.Embedding(CLASSES, W)
        self.register_buffer("average", torch.zeros(W))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("fixed", torch.linspace(-1, 1, W))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pool = [x, self.first(x)]
        total = x.new_zeros(())
        for step in self.steps:
            a, b = pool[-1 - step.a % len(pool)], pool[-1 - step.b % len(pool)]
            made = OPERATORS[step.name](self, a, b, step.n, ids)
            # Operators whose results nothing uses do not run in stages. In eager PyTorch they take random
            # numbers, and looking at a changed view decides on the order in which its gradients are added.
            for value in made:
                total = total + value.mean()
            pool += made
        kept = torch.cat(pool[-self.kept :], -1)
        return total + kept.square().mean() + functional.cross_entropy(self.head(wide(pool[-1])), ids)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x with W columns."""
    return x if x.shape[-1] == W else functional.pad(x, (0, W - x.shape[-1]))


def _like(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return b if a.shape == b.shape else b.mean(-1, keepdim=True)


Values = list[torch.Tensor]
OPERATORS: dict[str, Callable[[RandomModel, torch.Tensor, torch.Tensor, int, torch.Tensor], Values]] = {}


def _operator(function: Callable[..., Values]) -> Callable[..., Values]:
    OPERATORS[function.__name__] = function
    return function


@_operator
def linear(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [m.layers[n % 3](wide(a))]  # called more than once, frozen or not


@_operator
def transposed_weight(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [wide(a) @ m.layers[n % 3].weight]  # type: ignore[operator]


@_operator
def scaled(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [wide(a) * m.scale + m.fixed]


@_operator
def norm(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [m.norm(wide(a)) if n % 2 else m.batch_norm(wide(a))]


@_operator
def embedding(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [m.table((ids + n) % CLASSES), functional.one_hot(ids, CLASSES).float()]


@_operator
def pointwise(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [(torch.tanh, torch.relu, functional.gelu, torch.sigmoid, torch.cos)[n % 5](a)]


@_operator
def binary(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    b = _like(b, a)
    return [(a + b, a - b, a * b.tanh(), torch.maximum(a, b), torch.where(a > b, a, b))[n % 5]]


@_operator
def several(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    a = wide(a)
    return (
        lambda: list(a.chunk(2, -1)),
        lambda: list(a.split([1, 2, 3], -1))[1:],
        lambda: list(a.unflatten(-1, (3, 2)).unbind(1)),
        lambda: [values := a.topk(3).values, values * 2],
        lambda: [a.gather(-1, a.sort(-1).indices), a.max(-1, keepdim=True).values],
        lambda: list(torch.std_mean(a, -1, keepdim=True)),
        lambda: list(torch.tensor_split(a, 2, -1)),
    )[n % 7]()


@_operator
def view(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    a = wide(a)
    return (
        lambda: [a[:, 1:4]],
        lambda: [a.view(a.shape[0], 2, 3).transpose(1, 2).reshape(a.shape[0], W)],
        lambda: [a[:, :1].expand(-1, W)],
        lambda: [a.flip(-1), a.t().t()],
        lambda: [a.unsqueeze(1).squeeze(1), a[:, ::2]],
        lambda: [a.contiguous(), a.to(a.dtype)],
    )[n % 6]()


@_operator
def attention(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    q, k = (item.view(-1, 1, 3, 2) for item in (wide(a), wide(b)))
    dropout = 0.2 if n % 2 else 0.0
    mixed = functional.scaled_dot_product_attention(q, k, k, dropout_p=dropout, is_causal=n % 3 == 0)
    return [mixed.reshape(-1, W)]


@_operator
def dropout(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [functional.dropout(a, 0.3, inplace=n % 3 == 0)]


@_operator
def noise(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    return [a + torch.rand_like(a)]


@_operator
def cut_off(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    if n % 5 == 0:
        return [a.detach() * _like(b, a)]
    with torch.no_grad():
        held = functional.dropout(a, 0.3) if n % 5 == 1 else a * 2
        if n % 5 == 2:
            a.mul_(0.5)
        if n % 5 != 3:
            return [held, held.relu_() + a]
        with torch.enable_grad():
            inner = a * _like(b, a)
        return [held, inner, inner + held]


@_operator
def constant(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    made = (torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.arange(W) * 0.5, torch.ones(W))[n % 3]
    return [wide(a) * made, torch.zeros_like(a)]


@_operator
def changed_in_place(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    b = _like(b, a)
    (
        lambda: a.relu_(),
        lambda: a.add_(b),
        lambda: a.mul_(b.tanh()),
        lambda: a.masked_fill_(b > 0.5, 0.25),
        lambda: a.copy_(b.expand_as(a)),
        lambda: functional.relu(a, inplace=True),
    )[n % 6]()
    return []


@_operator
def changed_through_view(
    m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor
) -> Values:
    a, before = wide(a) if n % 2 else wide(a) * 1, b.mean(-1)
    part = a[:, :2]
    (
        lambda: a[:, 1:3].mul_(2),
        lambda: a.view(-1, 2, 3)[:, 1].add_(before[:, None]),
        lambda: a.add_(before[:, None]),
        lambda: a.__setitem__((slice(None), 0), before),
        lambda: a.select(1, 2).zero_(),
        lambda: part.copy_(before[:, None].expand(-1, 2)),
    )[n % 6]()
    return [part * 3, a] if n % 4 < 2 else [part, a]


@_operator
def filled(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    """A tensor without a gradient takes one up, after a view of it was made."""
    made = torch.zeros(a.shape[0], W)
    part = made[:, 1:4]
    if n % 2:
        made.add_(wide(a))
    else:
        with torch.no_grad():
            made.add_(wide(a))
    return [made, part]


@_operator
def buffers(m: RandomModel, a: torch.Tensor, b: torch.Tensor, n: int, ids: torch.Tensor) -> Values:
    a = wide(a)
    if n % 5 == 0:
        m.average.mul_(0.9).add_(a.detach().mean(0), alpha=0.1)
    elif n % 5 == 1:
        with torch.no_grad():
            m.average.lerp_(a.mean(0), 0.1)
            m.count += 1
    elif n % 5 == 2:
        m.average = 0.5 * m.average + a.detach().mean(0)
    elif n % 5 == 3:
        m.average[1:3] = a.detach()[0, 1:3]
    else:
        m.count.add_(1)
        return [a * m.count]  # refused: recompute would count again
    return []


def steps() -> st.SearchStrategy[tuple[Step, ...]]:
    """Programs of up to a dozen steps; operands are mostly recent."""
    near = st.integers(0, 3) | st.integers(0, 12)
    step = st.builds(Step, st.sampled_from(sorted(OPERATORS)), near, near, st.integers(0, 41))
    return st.lists(step, min_size=2, max_size=12).map(tuple)


def case(program: tuple[Step, ...], kept: int) -> Case:
    """The model of a program with weights that depend on nothing else, and a batch."""
    generator = torch.Generator().manual_seed(3)
    batch = {
        "x": torch.randn(BATCH, W, generator=generator),
        "ids": torch.randint(0, CLASSES, (BATCH,), generator=generator),
    }
    torch.manual_seed(0)
    return Case(RandomModel(program, kept).train(), batch)
