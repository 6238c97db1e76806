"""The network: one UNet, of which DDPM and DDPM++ are settings."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config.schema import Network
from model.block import (
    Block,
    ConvResample,
    MiddleBlock,
    ResidualBlock,
    ResidualResample,
    SelfCondition,
    TimeEmbedding,
)


class UNet(nn.Module):
    """F(x, c_noise): the raw network output; decoder blocks are named out_1 .. out_n from below.

    Encoder: per resolution `n_blocks` blocks, then one that halves, except after the last.
    Decoder: per resolution from the bottom `n_blocks + 1` blocks, each on the concatenation with
    the matching encoder output, then one that doubles, except after the last. `classes` is the
    number of labels it is conditioned on, 0 for none. With `self_condition`, all that comes after
    that block gets another embedding: see SelfCondition.
    """

    def __init__(self, network: Network, classes: int = 0):
        super().__init__()
        self.classes = classes
        image_channels = network.image_shape[0]
        widths = [network.n_channels * mult for mult in network.ch_mults]
        emb_ch = 4 * network.n_channels
        dropout, head = network.dropout, network.attn_channels_per_head

        def resample(channels: int, direction: str) -> nn.Module:
            if network.use_res_for_updown:
                return ResidualResample(channels, emb_ch, dropout, direction)
            return ConvResample(channels, direction)

        self.image_proj = nn.Conv2d(image_channels, network.n_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(network.n_channels, network.augment_dim, classes)

        self.down = nn.ModuleList()
        ch = network.n_channels
        skips = [ch]
        for level, (width, attend) in enumerate(zip(widths, network.is_attn, strict=True)):
            for _ in range(network.n_blocks):
                self.down.append(Block(ch, width, emb_ch, dropout, attend, head))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.down.append(resample(ch, "down"))
                skips.append(ch)

        self.middle = MiddleBlock(ch, emb_ch, dropout, head)

        self.up = nn.ModuleList()
        self.block_names = network.block_names
        for level in reversed(range(len(widths))):
            width, attend = widths[level], network.is_attn[level]
            for _ in range(network.n_blocks + 1):
                self.up.append(Block(ch + skips.pop(), width, emb_ch, dropout, attend, head))
                ch = width
            if level:
                self.up.append(resample(ch, "up"))

        self.norm = nn.GroupNorm(8, ch)
        self.final = nn.Conv2d(ch, image_channels, 3, padding=1)
        if network.zero_init:
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    nn.init.zeros_(module.conv2[1].weight)
                    nn.init.zeros_(module.conv2[1].bias)
        self.self_condition = network.self_condition
        if self.self_condition:  # last: the weights above are drawn as without it
            level = self.block_names.index(self.self_condition) // (network.n_blocks + 1)
            width = widths[-1 - level]
            self.conditioning = SelfCondition(width, emb_ch, network.self_condition_gate)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        augment: Tensor | None = None,
        blocks: Collection[str] | None = None,
        y: Tensor | None = None,
        with_output: bool = False,
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor, dict[str, Tensor]]:
        """x: (N, C, H, W), c_noise: (N,), augment: (N, augment_dim) -> F: (N, C, H, W).

        y: (N,), the labels of a class-conditional network, -1 for none; None: none at all.

        With `blocks`, the spatial means of those instead: {name: (N, channels)}, float32;
        what lies above the last one asked for is not computed. `with_output` gives both of one
        pass, F and the means.
        """
        emb = self.time_emb(c_noise, augment, y)
        h = self.image_proj(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        features: dict[str, Tensor] = {}
        names = iter(self.block_names)
        for layer in self.up:
            if not isinstance(layer, Block):
                h = layer(h, emb)
                continue
            h = layer(torch.cat((h, skips.pop()), dim=1), emb)
            name = next(names)
            if blocks is not None and name in blocks:
                features[name] = h.mean(dim=(2, 3), dtype=torch.float32)
                if len(features) == len(set(blocks)) and not with_output:
                    return features
            if name == self.self_condition:
                emb = self.conditioning(h, emb)
        output = self.final(F.silu(self.norm(h)))
        return (output, features) if with_output else output
