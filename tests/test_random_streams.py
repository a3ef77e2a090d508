from __future__ import annotations

import torch

from rpcompile.random_streams import microbatch_seed, seeded, stream_seed


def draw(seed: int, number: int) -> torch.Tensor:
    with microbatch_seed(seed):
        return seeded(torch.rand_like, number, torch.zeros(5))


def test_streams_differ_by_microbatch_and_operator_and_repeat() -> None:
    assert torch.equal(draw(1, 0), draw(1, 0))
    assert not torch.equal(draw(1, 0), draw(1, 1))
    assert not torch.equal(draw(1, 0), draw(2, 0))


def test_default_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    draw(1, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_stream_seeds_do_not_collide_and_fit_a_generator() -> None:
    seeds = {stream_seed(seed, number) for seed in range(100) for number in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
