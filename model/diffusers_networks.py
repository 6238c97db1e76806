"""Networks of the library diffusers, as the F(x, c_noise) that a denoiser holds.

Nothing here imports diffusers: the networks come built, from `diffusers_checkpoints`.
"""

import json
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VAE_BATCH = 16  # images of 256 x 256 take 1 GB each in a VAE
WHOLE = 1e-3  # a timestep that is nearer to a whole one is that one: c_noise is rounded


class Codec(nn.Module):
    """Between images, (N, C, H, W) in [-1, 1], and what a network of fixed size sees.

    `shape` is that of the images it was trained on. With a `vae` (an AutoencoderKL) it sees
    latents, else the images themselves.
    """

    def __init__(self, shape: tuple[int, int, int], vae: nn.Module | None = None):
        super().__init__()
        self.shape, self.vae = tuple(shape), vae
        scale = torch.tensor(1.0 if vae is None else vae.config.scaling_factor)
        self.register_buffer("scale", scale)  # a latent is the posterior's mean times this

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the network sees images of this shape as they are."""
        return self.vae is None and tuple(shape) == self.shape

    def encode(self, images: Tensor) -> Tensor:
        """Images of any size -> what the network sees of them: resized, and of a latent model the
        mean of the posterior times the scaling factor. A grey image becomes one of three channels.
        """
        images = images.expand(-1, max(images.shape[1], self.shape[0]), -1, -1)
        if images.shape[2:] != self.shape[1:]:
            images = F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True)
        if self.vae is None:
            return images
        return self.vae.encode(images).latent_dist.mean * self.scale

    def decode(self, x0: Tensor) -> Tensor:
        """What the network draws -> images, near [-1, 1]."""
        if self.vae is None:
            return x0
        latents = (x0.float() / self.scale).split(VAE_BATCH)
        return torch.cat([self.vae.decode(part).sample for part in latents])


class DiffusersNet(nn.Module):
    """F around a UNet2DModel or a DiTTransformer2DModel.

    Blocks are named from the first computed: out_1 .. are the ResNets of a UNet's decoder (before
    the attention that follows some), block_1 .. the layers of a DiT. `classes` is the number of
    labels; a DiT that gets none gets its null class. `diffusion` is the section of a config; it
    is kept among the weights, so that a fingerprint of those is of all that decides the outputs.
    """

    def __init__(self, network: nn.Module, diffusion: dict, codec: Codec):
        super().__init__()
        self.network, self.codec, self.n_T = network, codec, diffusion["n_T"]
        self.register_buffer("diffusion", torch.tensor(list(json.dumps(diffusion).encode())))
        self.block_names = list(self._blocks())
        self.classes = getattr(network.config, "num_embeds_ada_norm", 0)

    def _blocks(self) -> dict[str, nn.Module]:
        layers = getattr(self.network, "transformer_blocks", None)
        if layers is not None:
            return {f"block_{i}": layer for i, layer in enumerate(layers, 1)}
        resnets = (resnet for block in self.network.up_blocks for resnet in block.resnets)
        return {f"out_{i}": resnet for i, resnet in enumerate(resnets, 1)}

    def renew(self) -> None:
        """Gives the network random weights, as diffusers draws them from the global generator."""
        self.network = type(self.network).from_config(self.network.config)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        blocks: Collection[str] | None = None,
        y: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """x: (N, C, H, W), c_noise: (N,) in (0, 1], t / n_T with t from 1 -> F: (N, C, H, W).

        y: (N,), labels, -1 for none; None: none at all. A learned variance is left out of F.
        With `blocks`, the means of those over space or tokens instead: {name: (N, channels)},
        float32; what lies above the last one asked for is not computed.
        """
        t = c_noise * self.n_T - 1  # theirs count from 0
        t = torch.where((t - t.round()).abs() < WHOLE, t.round(), t)

        def run() -> Tensor:
            labels = {"class_labels": self._labels(x, y)} if self.classes else {}
            return self.network(x, t, **labels).sample[:, : x.shape[1]]

        return run() if blocks is None else self._features(run, blocks)

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            y = torch.full((len(x),), -1, device=x.device)
        return torch.where(y < 0, self.classes, y)

    def _features(self, run: Callable[[], Tensor], blocks: Collection[str]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
            def hook(module: nn.Module, inputs: tuple, h: Tensor) -> None:
                over = (2, 3) if h.ndim == 4 else 1
                features[name] = h.mean(dim=over, dtype=torch.float32)
                if len(features) == len(set(blocks)):
                    raise _AllFound

            return hook

        places = self._blocks()
        hooks = [places[name].register_forward_hook(keep(name)) for name in set(blocks)]
        try:
            run()
        except _AllFound:  # the only way out of the middle of another library's forward
            return features
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError(f"a forward pass went by without {set(blocks) - set(features)}")


class _AllFound(Exception):
    pass
