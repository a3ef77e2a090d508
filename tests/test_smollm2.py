"""The real pretrained SmolLM2-135M, fine-tuned whole in float32 on four workers, against plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch

import rpcompile
from rpcompile.demo.model import load_smollm2
from tests import reference

STEPS, MICROBATCHES, SEQUENCE = 5, 2, 8


@pytest.mark.slow
def test_five_steps_of_the_real_model_equal_plain_pytorch() -> None:
    """Bit for bit, the tied embedding's two uses summed last (see tests/test_parity.py)."""
    model, _ = load_smollm2()
    model.config.use_cache = False
    model.train()
    plain = copy.deepcopy(model)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    embedding, head = plain.model.embed_tokens.weight, plain.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(STEPS):
        ids = torch.randint(0, 49152, (MICROBATCHES, SEQUENCE), generator=generator)
        data.append({"input_ids": ids, "labels": ids.clone()})

    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p is not head], lr=1e-4)
    expected = []
    for batch in data:
        expected.append(reference.forward_backward(plain, batch, MICROBATCHES, random=False))
        embedding.grad = head.grad + embedding.grad
        last = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter is not head}
        optimizer.step()
        head.data.copy_(embedding.data)
        plain.zero_grad()

    with rpcompile.compile(model, 4, microbatches=MICROBATCHES, example_inputs=data[0]) as compiled:
        assert {job.gpu for job in compiled.plan.schedule.jobs} == {0, 1, 2, 3}
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-4)
        for step, batch in enumerate(data):
            assert compiled.forward_backward(**batch) == expected[step]
            if step == STEPS - 1:
                for name, parameter in model.named_parameters():
                    assert torch.equal(parameter.grad, last[name]), name
            compiled.step(optimizer)
            optimizer.zero_grad()
    expected_state = plain.state_dict()
    assert all(torch.equal(value, expected_state[name]) for name, value in model.state_dict().items())
