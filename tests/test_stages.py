"""Staged execution against plain PyTorch, for every family and many partitions, bit for bit."""

from __future__ import annotations

import pytest

from tests import models, staged


@pytest.mark.parametrize("family", models.FAMILIES)
def test_staged_loss_gradients_and_buffers_equal_plain_pytorch(family: str) -> None:
    staged.check_parity(models.make(family), partitions=4)
