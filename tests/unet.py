"""A denoising UNet as diffusion models use it: time embedding, skips, attention at the lowest level."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def timestep_embedding(timesteps: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines and cosines of geometric frequencies: (B,) -> (B, channels)."""
    half = channels // 2
    steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10_000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Norm, convolution, shift by the time embedding, norm, dropout, convolution: (B, C, H, W) and (B, T)."""

    def __init__(self, inputs: int, outputs: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = hidden + self.time(functional.silu(time))[:, :, None, None]
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        return self.skip(x) + hidden


class AttentionBlock(nn.Module):
    """Self-attention over all positions of the feature map."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).reshape(batch, channels, height, width)


class DiffusionUNet(nn.Module):
    """Predicts the noise that was added to an image; returns the mean squared error.

    Args:
        channels: Width of each level; the resolution halves from level to level.
        blocks: Residual blocks a level.
        heads: Attention heads at the lowest level.
        dropout: Probability in each residual block.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        width, time = channels[0], 4 * channels[0]
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        skips = []
        for level in channels:
            self.down.append(nn.ModuleList())
            for _ in range(blocks):
                self.down[-1].append(ResidualBlock(width, level, time, dropout))  # type: ignore[union-attr]
                width = level
                skips.append(width)
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle1 = ResidualBlock(width, width, time, dropout)
        self.attention = AttentionBlock(width, heads)
        self.middle2 = ResidualBlock(width, width, time, dropout)
        for level in reversed(channels):
            self.grow.append(nn.ConvTranspose2d(width, width, 2, stride=2))
            self.up.append(nn.ModuleList())
            for _ in range(blocks):
                self.up[-1].append(ResidualBlock(width + skips.pop(), level, time, dropout))  # type: ignore[union-attr]
                width = level
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        time = self.time(timestep_embedding(timesteps, self.width))
        hidden, skips = self.first(x), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(hidden, time)
                skips.append(hidden)
            hidden = shrink(hidden)
        hidden = self.middle2(self.attention(self.middle1(hidden, time)), time)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            hidden = grow(hidden)
            for block in blocks:  # type: ignore[attr-defined]
                hidden = block(torch.cat([hidden, skips.pop()], dim=1), time)
        return functional.mse_loss(self.last(hidden), noise)
