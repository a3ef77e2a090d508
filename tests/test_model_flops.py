"""FLOPs of whole models, captured as they train, against torch's counter on real tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from torch.utils.flop_counter import FlopCounterMode

from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.sizes import symbol
from tests import family_tiny, models, staged

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import CostedGraph
    from tests.models import Case


def counted(case: Case) -> tuple[int, int]:
    """Forward and backward FLOPs as torch counts them while the model runs."""
    with FlopCounterMode(display=False) as counter:
        loss = case.model(**case.batch).loss
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return forward, counter.get_total_flops()


def estimated(costed: CostedGraph, only: str = "") -> tuple[int, int]:
    """The same from the formulas, of the nodes whose name begins with `only`, at the whole batch's size."""
    sizes = {symbol("batch"): models.BATCH, symbol("sequence"): models.SEQUENCE}
    costs = [cost for name, cost in costed.costs.items() if name.startswith(only)]
    return (
        int(sum(cost.forward_flops.subs(sizes) for cost in costs)),
        int(sum(cost.backward_flops.subs(sizes) for cost in costs)),
    )


def eager_llama() -> Case:
    """Attention by matrix products, where the conventions are the same."""
    return family_tiny.causal("Llama", attn_implementation="eager")


@pytest.mark.parametrize("make", [eager_llama, family_tiny.resnet], ids=["transformer", "convolutions"])
def test_totals_are_equal_where_the_convention_is_the_same(make: Callable[[], Case]) -> None:
    case = models.build(make)
    costed = EstimateCosts().run(staged.capture(case.model, case.batch))
    assert estimated(costed) == counted(case)


def test_mixture_differs_by_the_grouped_products_alone() -> None:
    """The counter has no formula for them; each row meets the matrices of its own experts only."""
    case = models.build(lambda: family_tiny.moe(attn_implementation="eager"))
    costed = EstimateCosts().run(staged.capture(case.model, case.batch))
    forward, backward = estimated(costed)
    grouped = [name for name, cost in costed.costs.items() if "each row in one group" in cost.source]
    rows, hidden, inner = models.BATCH * models.SEQUENCE * 2, 32, 16  # two experts a token
    layers = 2
    expected = layers * 2 * rows * (hidden * 2 * inner + inner * hidden)
    assert len(grouped) == 2 * layers
    assert counted(case) == (forward - expected, backward - 2 * expected)


def test_fused_attention_is_not_counted_on_cpus() -> None:
    """The counter has no formula for their kernel; ours is its formula for GPUs, halved where causal."""
    case = models.build(lambda: family_tiny.causal("Llama"))
    costed = EstimateCosts().run(staged.capture(case.model, case.batch))
    forward, _ = estimated(costed)
    attention, attention_backward = estimated(costed, "scaled_dot_product_attention")
    tokens, layers, width = models.SEQUENCE, 2, 32
    assert attention == layers * models.BATCH * 2 * 2 * tokens * tokens * width / 2
    assert attention_backward == 2.5 * attention
    assert counted(case)[0] == forward - attention
