from __future__ import annotations

import pytest
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


def test_operators_without_tensors_draw_on_the_device_they_make_theirs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recompute must draw the same numbers on a GPU, whose generator is another."""
    gpu = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (None, gpu))

    def rand(size: int, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cuda:1")
        return torch.rand(size, generator=gpu)

    def drawn(number: int) -> torch.Tensor:
        with microbatch_seed(1):
            return seeded(rand, number, 5, device=torch.device("cuda:1"))

    before = torch.get_rng_state(), gpu.get_state()
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], gpu.get_state())
