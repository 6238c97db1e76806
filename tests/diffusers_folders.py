"""Folders of diffusers with tiny networks of random weights, for the tests that read them."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

N_T = 40
SIZE = 8
CLASSES = 1000  # the DiTPipeline's null class is number 1000


def scheduler(kind: str = "DDIMScheduler", **options):
    return getattr(diffusers, kind)(num_train_timesteps=N_T, **options)


def unet(**options):
    return diffusers.UNet2DModel(
        sample_size=SIZE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def save_unet(folder, pipeline: str = "DDIMPipeline", schedule=None, safe=True, **options):
    torch.manual_seed(0)
    schedule = schedule or scheduler(pipeline.replace("Pipeline", "Scheduler"))
    getattr(diffusers, pipeline)(unet(**options), schedule).save_pretrained(
        folder, safe_serialization=safe
    )
    return folder


def save_dit(folder, **options):
    """A DiT with learned variances on latents of 4x4 of images of 8x8."""
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3,
        sample_size=SIZE // 2, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    for weight in dit.parameters():  # its last layers would start at 0 in training
        torch.nn.init.normal_(weight, std=0.3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    schedule = scheduler(clip_sample=False, **options)
    diffusers.DiTPipeline(dit, vae, schedule).save_pretrained(folder)
    return folder
