"""One training step as four projects write it, each with the loop that is usual there.

A loop has `steps(n)`, and the network `net` with `forward_one()`, its call for one image.
"""

import contextlib
import io
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from config import Config
from datasets import Dataset
from model.models import build_denoiser
from training.distill import batches_of
from training.run import LOG_EVERY
from training.trainer import Trainer
from utils import amp_dtype, autocast, seed_everything

# The nearest to the main network's 5,880,899 parameters: diffusers' has as many, and the same
# FLOPs; of denoising-diffusion-pytorch's the nearest width is 56.
DIFFUSERS = {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1}
DDPM_PYTORCH = {"dim": 56, "dim_mults": (1, 2, 2, 2)}
PNGS = 1000  # files of denoising-diffusion-pytorch's folder, each listed many times


class Loop(ABC):
    """A training that can be stepped. `close` ends its workers."""

    net: nn.Module
    images_per_step: int

    def __init__(self, config: Config, train: Dataset, device: torch.device, use_amp: bool):
        self.config, self.device, self.use_amp = config, device, use_amp
        self.images_per_step = config.batch_size

    @abstractmethod
    def steps(self, n: int) -> None:
        """n whole training steps, from where it stopped."""

    @abstractmethod
    def forward_one(self) -> Tensor:
        """The network's output for one image."""

    def close(self) -> None:
        """Ends what runs beside it: here nothing."""
        return

    def one_image(self) -> tuple[Tensor, Tensor]:
        """An image (1, C, H, W) and a timestep (1,)."""
        x = torch.zeros(1, *self.config.network.image_shape, device=self.device)
        return x, torch.ones(1, dtype=torch.long, device=self.device)


class Ours(Loop):
    """`training.trainer`, with what a run reads back every LOG_EVERY steps."""

    def __init__(
        self,
        config: Config,
        train: Dataset,
        device: torch.device,
        use_amp: bool,
        compiles: bool = False,
    ):
        super().__init__(config, train, device, use_amp)
        self.trainer = Trainer(config, train, device, use_amp, compiles)
        self.trainer.denoiser.train()
        self.net = self.trainer.denoiser.net
        self.images_per_step = self.trainer.images_per_step
        self.x0, _ = self.trainer.batches[0]
        self.sigma = self.trainer.denoiser.training_sigma(torch.rand(len(self.x0), device=device))
        self.noise = torch.randn_like(self.x0)

    def steps(self, n: int) -> None:
        """As many, see `Loop`."""
        for _ in range(n):
            self.trainer.train_step()
            if self.trainer.step % LOG_EVERY == 0:
                self.trainer.window.read_and_reset()

    def forward_one(self) -> Tensor:
        """See `Loop`."""
        x, t = self.one_image()
        return self.net(x, t.float())

    def forward_backward(self) -> None:
        """The part of a step that is the network's alone, on tensors that stay the same."""
        for batch in batches_of(len(self.x0), self.config.accumulate):
            with autocast(self.device, self.use_amp):
                found = self.trainer.loss(self.x0[batch], self.sigma[batch], self.noise[batch])
            loss = found[0] if self.trainer.distill else found  # beside it the projected features
            self.trainer.scaler.scale(loss.mean()).backward()
        self.trainer.optimizer.zero_grad(set_to_none=True)


class Pictures(torch.utils.data.Dataset):
    """Images through PIL and torchvision's transforms, as most repositories read CIFAR-10."""

    def __init__(self, images: np.ndarray):
        from torchvision import transforms  # slow to import

        channels = images.shape[1]
        self.images = images.transpose(0, 2, 3, 1)
        self.transform = transforms.Compose([
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * channels, [0.5] * channels),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[index].squeeze()))


class Usual(Loop):
    """Our network in the loop that most repositories write."""

    def __init__(self, config: Config, train: Dataset, device: torch.device, use_amp: bool):
        super().__init__(config, train, device, use_amp)
        loader = torch.utils.data.DataLoader(
            Pictures(train.images), config.batch_size, shuffle=True, drop_last=True,
            num_workers=1, pin_memory=device.type == "cuda",
        )  # fmt: skip
        self.batches = _endless(loader)
        seed_everything(config.seed, "init")
        self.build()
        dtype = amp_dtype(device) if use_amp else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def build(self) -> None:
        """The network, its copy for the EMA, the optimizer."""
        self.denoiser = build_denoiser(self.config).to(self.device).train()
        self.net = self.denoiser.net
        self.ema = build_denoiser(self.config).to(self.device).eval()
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=self.config.lrate, foreach=False, fused=False
        )
        self.losses = []

    def loss(self, x0: Tensor) -> Tensor:
        """Of a batch (N, C, H, W), averaged."""
        sigma = self.denoiser.training_sigma(torch.rand(len(x0), device=self.device))
        return self.denoiser.loss(x0, sigma, torch.randn_like(x0)).mean()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Parameter by parameter."""
        decay = self.config.ema
        pairs = zip(self.ema.net.parameters(), self.net.parameters(), strict=True)
        for average, parameter in pairs:
            average.mul_(decay).add_(parameter, alpha=1 - decay)

    def steps(self, n: int) -> None:
        """As many, see `Loop`."""
        for _ in range(n):
            self.step()

    def step(self) -> None:
        """As it stands in a hundred scripts."""
        x0 = next(self.batches).to(self.device)
        self.optimizer.zero_grad()
        with autocast(self.device, self.use_amp):
            loss = self.loss(x0)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_ema()
        self.losses.append(loss.item())

    def forward_one(self) -> Tensor:
        """See `Loop`."""
        x, t = self.one_image()
        return self.net(x, t.float())

    def close(self) -> None:
        """Ends the workers of its DataLoader."""
        self.batches.close()


class Diffusers(Usual):
    """diffusers' UNet2DModel in the loop of its example: DDPMScheduler, AdamW, EMAModel."""

    def build(self) -> None:
        """As the example has it."""
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        channels, height, _ = self.config.network.image_shape
        kinds = len(DIFFUSERS["block_out_channels"])
        self.net = UNet2DModel(
            sample_size=height, in_channels=channels, out_channels=channels,
            down_block_types=("DownBlock2D",) * kinds, up_block_types=("UpBlock2D",) * kinds,
            dropout=self.config.network.dropout, **DIFFUSERS,
        ).to(self.device).train()  # fmt: skip
        self.scheduler = DDPMScheduler(num_train_timesteps=self.config.diffusion.n_T)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.config.lrate)
        self.ema = EMAModel(self.net.parameters(), decay=self.config.ema)
        self.ema.to(self.device)
        self.losses = []

    def loss(self, x0: Tensor) -> Tensor:
        """Of the noise, averaged."""
        noise = torch.randn_like(x0)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (len(x0),), device=self.device)
        return F.mse_loss(self.net(self.scheduler.add_noise(x0, noise, t), t).sample, noise)

    def update_ema(self) -> None:
        """All parameters at once."""
        self.ema.step(self.net.parameters())

    def forward_one(self) -> Tensor:
        """See `Loop`."""
        return self.net(*self.one_image()).sample


class DDPMPytorch(Loop):
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion, stepped by its own Trainer."""

    def __init__(self, config: Config, train: Dataset, device: torch.device, use_amp: bool):
        from accelerate.state import AcceleratorState
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from denoising_diffusion_pytorch import Trainer as Theirs

        super().__init__(config, train, device, use_amp)
        AcceleratorState._reset_state(True)  # one precision per process, unless told so
        os.environ["ACCELERATE_USE_CPU"] = str(device.type == "cpu").lower()
        channels, height, _ = config.network.image_shape
        self.net = Unet(channels=channels, dropout=config.network.dropout, **DDPM_PYTORCH)
        process = GaussianDiffusion(
            self.net, image_size=height, timesteps=config.diffusion.n_T, objective="pred_noise"
        )
        self.folder = TemporaryDirectory()
        root = Path(self.folder.name)
        _write_pngs(train.images[:PNGS], root / "images")
        dtype = amp_dtype(device) if use_amp else None
        self.trainer = Theirs(
            process, str(root / "images"), train_batch_size=config.batch_size,
            train_lr=config.lrate, train_num_steps=0, ema_decay=config.ema,
            results_folder=str(root / "results"), save_and_sample_every=10**9,
            calculate_fid=False, amp=dtype is not None, max_grad_norm=config.grad_clip,
            mixed_precision_type="bf16" if dtype == torch.bfloat16 else "fp16",
        )  # fmt: skip
        listed = self.trainer.ds.paths  # as many as ours: an epoch ends as seldom
        self.trainer.ds.paths = listed * max(len(train) // len(listed), 1)

    def steps(self, n: int) -> None:
        """As many, see `Loop`."""
        self.trainer.train_num_steps += n
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.trainer.train()

    def forward_one(self) -> Tensor:
        """See `Loop`."""
        return self.net(*self.one_image())

    def close(self) -> None:
        """Ends the workers of its DataLoader."""
        self.trainer.dl.close()
        self.folder.cleanup()


def _endless(loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
    for _ in itertools.count():
        yield from loader


def _write_pngs(images: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(folder / f"{i}.png")
