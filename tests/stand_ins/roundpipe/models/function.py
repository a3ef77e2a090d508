"""The loss of `roundpipe.models`, not compiled."""

from __future__ import annotations

import torch
from torch import nn


def CompileForCausalLMLoss(  # noqa: N802
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.view(-1, vocab_size).float(), shifted.reshape(-1))
