"""The pieces of the UNet: time embedding, residual block, attention, resampling.

Module names are those of the reference implementation, so its weights load here.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config.schema import NORM_GROUPS


class TimeEmbedding(nn.Module):
    """c_noise: (N,) -> (N, 4 * n_channels): sinusoids, then two linears with SiLU between.

    `classes` > 0 adds an embedding of the label y: (N,) in 0 .. classes - 1, or -1 for none.
    """

    def __init__(self, n_channels: int, augment_dim: int = 0, classes: int = 0):
        super().__init__()
        self.width = 4 * n_channels
        self.lin1 = nn.Linear(n_channels, self.width)
        self.lin2 = nn.Linear(self.width, self.width)
        if augment_dim:
            self.aug_emb = nn.Linear(augment_dim, n_channels, bias=False)
        if classes:
            self.label_emb = nn.Embedding(classes, self.width)
        half = n_channels // 2
        freqs = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(
        self, c_noise: Tensor, augment: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """c_noise: (N,), augment: (N, augment_dim), y: (N,) -> (N, 4 * n_channels)."""
        angles = c_noise[:, None] * self.freqs
        emb = torch.cat((angles.sin(), angles.cos()), dim=1)
        if hasattr(self, "aug_emb"):
            untouched = emb.new_zeros(len(emb), self.aug_emb.in_features)
            emb = emb + self.aug_emb(untouched if augment is None else augment)
        emb = self.lin2(F.silu(self.lin1(emb)))
        if y is not None:
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        return emb


class ResidualBlock(nn.Module):
    """x: (N, in, H, W), emb: (N, emb) -> (N, out, H', W').

    `resample` is None, "down" or "up": both paths are average-pooled 2x2, or upsampled to
    nearest, after the first activation (DDPM++).
    """

    def __init__(
        self, in_ch: int, out_ch: int, emb_ch: int, dropout: float, resample: str | None = None
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_ch)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(out_ch, out_ch, 3, padding=1))
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_ch, out_ch))
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(None, 2)}[
            resample
        ]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, in, H, W), emb: (N, emb) -> (N, out, H', W')."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.time_emb(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(self.resample(x))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of x: (N, C, H, W), with a residual connection."""

    def __init__(self, channels: int, channels_per_head: int | None = None):
        super().__init__()
        self.n_heads = channels // (channels_per_head or channels)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> the same shape."""
        n, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        qkv = self.projection(pixels).view(n, height * width, self.n_heads, -1).transpose(1, 2)
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # (N, heads, H*W, C/heads)
        h = self.output(h.transpose(1, 2).reshape(n, height * width, c))
        return x + h.transpose(1, 2).view(n, c, height, width)


class Block(nn.Module):
    """A residual block, and attention after it where asked for."""

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        emb_ch: int,
        dropout: float,
        attend: bool,
        channels_per_head: int | None = None,
    ):
        super().__init__()
        self.res = ResidualBlock(in_ch, out_ch, emb_ch, dropout)
        self.attn = AttentionBlock(out_ch, channels_per_head) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, in, H, W), emb: (N, emb) -> (N, out, H, W)."""
        return self.attn(self.res(x, emb))


class MiddleBlock(nn.Module):
    """Residual, attention, residual: the lowest resolution, between encoder and decoder."""

    def __init__(
        self, channels: int, emb_ch: int, dropout: float, channels_per_head: int | None = None
    ):
        super().__init__()
        self.res1 = ResidualBlock(channels, channels, emb_ch, dropout)
        self.attn = AttentionBlock(channels, channels_per_head)
        self.res2 = ResidualBlock(channels, channels, emb_ch, dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C, H, W), emb: (N, emb) -> like x."""
        return self.res2(self.attn(self.res1(x, emb)), emb)


class ConvResample(nn.Module):
    """Halves by a strided convolution, or doubles by nearest neighbours and a convolution."""

    def __init__(self, channels: int, direction: str):
        super().__init__()
        stride = 2 if direction == "down" else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.upsample = nn.Upsample(None, 2) if direction == "up" else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C, H, W) -> (N, C, H / 2, W / 2) or (N, C, 2 H, 2 W); emb is not used."""
        return self.conv(self.upsample(x))


class ResidualResample(nn.Module):
    """Halves or doubles by a residual block (DDPM++)."""

    def __init__(self, channels: int, emb_ch: int, dropout: float, direction: str):
        super().__init__()
        self.op = ResidualBlock(channels, channels, emb_ch, dropout, resample=direction)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C, H, W), emb: (N, emb) -> (N, C, H / 2, W / 2) or (N, C, 2 H, 2 W)."""
        return self.op(x, emb)


class SelfCondition(nn.Module):
    """h: (N, channels, H, W), emb: (N, emb_ch) -> (N, emb_ch): emb, to which the block that made h
    has added what it has seen.

    From DDAE++ (Xiang et al. 2025, arXiv 2505.10999): features of a decoder block are averaged
    over space, normalised, projected and added to the time embedding of the blocks after it. It
    calls this self-conditioning; that of Chen et al. 2022 (arXiv 2208.04202), which feeds the last
    denoised image back in, is another thing.

    Our reading, where the paper leaves it open: the norm is a layer norm with weights, the
    projection one linear layer. The projection starts at 0, so that a network begins as its plain
    twin. With `gate`, which is ours too, an image's share is scaled by 1 + w . SiLU(emb) + b, and
    w and b start at 0: at high noise a block knows less.
    """

    def __init__(self, channels: int, emb_ch: int, gate: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, emb_ch)
        self.gate = nn.Sequential(nn.SiLU(), nn.Linear(emb_ch, 1)) if gate else None
        for linear in [self.projection, *([self.gate[1]] if gate else [])]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """The embedding for the blocks that come after: (N, emb_ch)."""
        seen = self.projection(self.norm(h.mean(dim=(2, 3), dtype=torch.float32)))
        return emb + (seen if self.gate is None else seen * (1 + self.gate(emb)))
