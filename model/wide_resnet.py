"""WideResNet (Zagoruyko & Komodakis 2016, arXiv 1605.07146), told the noise level of its input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.block import TimeEmbedding
from support.errors import UserError

STEM = 16  # channels before the first group, whatever the width
EMBEDDED = 64  # n_channels of the time embedding, as in the project's UNet


class WideBlock(nn.Module):
    """x: (N, in, H, W), emb: (N, emb) -> (N, out, H / stride, W / stride).

    Norm, ReLU and 3x3 convolution, twice; the embedding is added between them. Where the channels
    change, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, in_ch: int, out_ch: int, emb_ch: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1, bias=False)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_ch, out_ch))
        self.norm2 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False)
        same = in_ch == out_ch
        self.shortcut = None if same else nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, in, H, W), emb: (N, emb) -> (N, out, H / stride, W / stride)."""
        h = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h) + self.time_emb(emb)[:, :, None, None]
        return self.conv2(F.relu(self.norm2(h))) + shortcut


class WideResNet(nn.Module):
    """x: (N, C, H, W), c_noise: (N,) -> logits (N, K); "WRN-28-10" is depth 28, width 10.

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels, the second
    and third halving the image; spatial mean, linear. Raises UserError for a depth that this
    does not allow.
    """

    def __init__(self, image_channels: int, n_classes: int, depth: int, width: int):
        super().__init__()
        n_blocks, rest = divmod(depth - 4, 6)
        if n_blocks < 1 or rest or width < 1:
            raise UserError(
                f"no WideResNet-{depth}-{width}: the depth must be 6 n + 4, as in 10, 16, 28, 40, "
                "and the width at least 1"
            )
        self.time_emb = TimeEmbedding(EMBEDDED)
        self.stem = nn.Conv2d(image_channels, STEM, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        ch = STEM
        for group in range(3):
            out_ch = STEM * width * 2**group
            for i in range(n_blocks):
                stride = 2 if group and i == 0 else 1
                self.blocks.append(WideBlock(ch, out_ch, self.time_emb.width, stride))
                ch = out_ch
        self.norm = nn.BatchNorm2d(ch)
        self.head = nn.Linear(ch, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # what the learning rate of 0.1 was tuned for
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """x: (N, C, H, W), c_noise: (N,) -> logits (N, K)."""
        emb = self.time_emb(c_noise)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.head(F.relu(self.norm(h)).mean(dim=(2, 3), dtype=torch.float32))
