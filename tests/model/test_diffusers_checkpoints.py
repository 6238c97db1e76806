"""Folders of diffusers, random ones written here, against what diffusers itself makes of them."""

import itertools
import json
import shutil
import sys

import pytest
import torch
from diffusers_folders import CLASSES, N_T, SIZE, diffusers, save_dit, save_unet, scheduler

from config.schema import DDPMDiffusion
from model import diffusers_checkpoints
from model.DDPM import DDPM
from model.diffusers_checkpoints import read_pipeline
from sampling import noise_levels, sampler_settings, solve
from support.errors import UserError

safetensors = pytest.importorskip("safetensors.torch")


def denoiser_of(folder) -> DDPM:
    net, facts = read_pipeline(folder)
    return DDPM(net, DDPMDiffusion(**facts["diffusion"])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("dit"))


def noise_of(shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- schedules and predictions


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("row", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules(tmp_path, kind, row):
    theirs = scheduler(kind, beta_schedule=row, beta_start=1e-3, beta_end=0.1)
    theirs.save_pretrained(tmp_path / "scheduler")
    section = diffusers_checkpoints.read_schedule(tmp_path / "scheduler/scheduler_config.json")
    ours = DDPM(torch.nn.Linear(1, 1), DDPMDiffusion(**section))
    abar = 1 / (1 + ours.sigma(torch.arange(1, N_T + 1)).double() ** 2)
    close(abar.float(), theirs.alphas_cumprod)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_predictions(tmp_path, prediction):
    """D at every timestep is what their scheduler takes for the clean image."""
    theirs = scheduler(prediction_type=prediction, clip_sample=False)
    ours = denoiser_of(save_unet(tmp_path, schedule=theirs))
    theirs.set_timesteps(N_T)
    x0, noise = noise_of((1, 3, SIZE, SIZE)), noise_of((1, 3, SIZE, SIZE), seed=2)
    for t in range(N_T):
        noisy = theirs.add_noise(x0, noise, torch.tensor([t]))
        with torch.no_grad():
            output = ours.net.network(noisy, t).sample
        expected = theirs.step(output, t, noisy).pred_original_sample
        sigma = ours.sigma(torch.tensor([t + 1]))
        close(ours(x0 + sigma * noise, sigma), expected, 1e-4)


# --- outputs and features


def test_outputs_of_a_unet(unet_folder):
    net = denoiser_of(unet_folder).net
    theirs = diffusers.UNet2DModel.from_pretrained(unet_folder / "unet").eval()
    x, t = noise_of((4, 3, SIZE, SIZE)), torch.tensor([1, 7, 29, N_T])
    with torch.no_grad():
        close(net(x, t / N_T), theirs(x, t - 1).sample, 0)  # not a bit of difference


def test_outputs_of_a_dit_are_without_its_variance(dit_folder):
    net = denoiser_of(dit_folder).net
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(dit_folder / "transformer").eval()
    x, t = noise_of((3, 4, 4, 4)), torch.tensor([1, 29, N_T])
    for y, labels in [(torch.tensor([5, -1, 999]), [5, CLASSES, 999]), (None, [CLASSES] * 3)]:
        with torch.no_grad():
            expected = theirs(x, t - 1, torch.tensor(labels)).sample[:, :4]
            close(net(x, t / N_T, y=y), expected, 0)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_features_are_those_of_forward_hooks(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    denoiser = denoiser_of(folder)
    shape = (2, 3, SIZE, SIZE) if kind == "unet" else (2, 4, 4, 4)
    x0, noise, t = noise_of(shape), noise_of(shape, seed=2), 21
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    if kind == "unet":
        network, labels = pipeline.unet.eval(), None
        modules = [resnet for block in network.up_blocks for resnet in block.resnets]
        names = [f"out_{i}" for i in range(1, 5)]
    else:
        network, labels = pipeline.transformer.eval(), torch.full((2,), CLASSES)
        modules = network.transformer_blocks
        names = ["block_1", "block_2", "block_3"]
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    noisy = pipeline.scheduler.add_noise(x0, noise, torch.tensor([t - 1]))
    with torch.no_grad():
        network(noisy, torch.full((2,), t - 1), class_labels=labels)
        features = denoiser.features(x0, t, noise, names)
    assert denoiser.block_names == names
    for name, output in zip(names, seen, strict=True):
        close(features[name], output.flatten(2).mean(2) if kind == "unet" else output.mean(1), 1e-4)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_nothing_above_the_last_block_asked_for_is_computed(kind, request):
    denoiser = denoiser_of(request.getfixturevalue(f"{kind}_folder"))
    first, *above = denoiser.net._blocks().values()
    computed = []
    for module in (first, *above, getattr(denoiser.net.network, "conv_out", above[-1])):
        module.register_forward_pre_hook(lambda module, inputs: computed.append(module))
    shape = (2, 3, SIZE, SIZE) if kind == "unet" else (2, 4, 4, 4)
    name = denoiser.block_names[0]
    assert list(denoiser.features(torch.zeros(shape), 21, torch.zeros(shape), [name])) == [name]
    assert computed == [first]
    denoiser.features(torch.zeros(shape), 21, torch.zeros(shape), denoiser.block_names)
    assert set(above) < set(computed)  # the hooks of the first call are gone


# --- samples


def drawn(denoiser, shape, sampler: str, steps: int, y=None, **options) -> torch.Tensor:
    """Images in 0..1 by our sampler, with the draws of their pipelines, which all come from one
    generator: x / sqrt(1 + sigma^2) starts as the first."""
    settings = sampler_settings(denoiser, sampler, steps, **options)
    sigma = noise_levels(denoiser, settings)[0]
    generator, scales = (
        seeded(),
        itertools.chain([(1 + sigma**2) ** 0.5 / sigma], itertools.repeat(1)),
    )
    x0 = solve(
        denoiser, settings, lambda: next(scales) * torch.randn(shape, generator=generator), y
    )
    return (denoiser.decode(x0).float() / 2 + 0.5).clamp(0, 1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def drawn_by_pipeline(folder, **options) -> torch.Tensor:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=seeded(), output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_samples_of_a_ddpm_pipeline(tmp_path):
    folder = save_unet(
        tmp_path, "DDPMPipeline", scheduler("DDPMScheduler", variance_type="fixed_large")
    )
    theirs = drawn_by_pipeline(folder, batch_size=2, num_inference_steps=N_T)
    close(drawn(denoiser_of(folder), (2, 3, SIZE, SIZE), "ddpm", N_T), theirs, 1e-4)


@pytest.mark.parametrize("row", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_samples_of_a_ddim_pipeline(tmp_path, row, prediction):
    schedule = scheduler(beta_schedule=row, prediction_type=prediction)
    folder = save_unet(tmp_path, "DDIMPipeline", schedule)
    theirs = drawn_by_pipeline(
        folder, batch_size=2, num_inference_steps=10, use_clipped_model_output=True
    )
    close(drawn(denoiser_of(folder), (2, 3, SIZE, SIZE), "ddim", 10), theirs, 1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_of_a_dit_pipeline(dit_folder, guidance):
    theirs = drawn_by_pipeline(
        dit_folder, class_labels=[3, 999], num_inference_steps=10, guidance_scale=guidance
    )
    denoiser, y = denoiser_of(dit_folder), torch.tensor([3, 999])
    ours = drawn(denoiser, (2, 4, 4, 4), "ddim", 10, y, guidance=guidance)
    assert ours.shape == (2, 3, SIZE, SIZE)
    close(ours, theirs, 1e-4)


# --- what is not read


def test_a_dit_under_its_first_name(dit_folder, tmp_path):
    """facebook/DiT-XL-2-256 names its network so."""
    shutil.copytree(dit_folder, tmp_path / "old")
    for file in ("model_index.json", "transformer/config.json"):
        path = tmp_path / "old" / file
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    x, t = noise_of((1, 4, 4, 4)), torch.tensor([0.5])
    with torch.no_grad():
        old, new = (denoiser_of(folder).net(x, t) for folder in (tmp_path / "old", dit_folder))
    assert torch.equal(old, new)


@pytest.mark.parametrize(("file", "change", "message"), [
    ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel"),
    ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "part vqvae is not read here"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type flow"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero"),
    ("unet/config.json", {"sample_size": None}, "no sample_size"),
    ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, "is not read here"),
    ("scheduler/scheduler_config.json", {"prediction_type": {}}, "prediction_type {}"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, r"n_T: .*'many'"),
    ("model_index.json", {"unet": ["diffusers", ["UNet2DModel"]]}, "is not read here"),
    ("unet/config.json", {"sample_size": "large"}, "sample_size large: one number, or two"),
    ("unet/config.json", {"sample_size": [8]}, "one number, or two"),
    ("unet/config.json", {"out_channels": 5}, "diffusers cannot read it"),
    ("unet/config.json", {"norm_num_groups": 0}, "diffusers cannot read it"),
    ("unet/config.json", {"down_block_types": 3}, "diffusers cannot read it"),
    ("unet/config.json", {"freq_shift": "far"}, "diffusers cannot read it"),
    ("unet/config.json", {"norm_eps": [1]}, "diffusers cannot read it"),
])  # fmt: skip
def test_what_is_not_read_is_refused_by_name(unet_folder, tmp_path, file, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(unet_folder, folder)
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_pipeline(folder)


@pytest.mark.parametrize(("options", "message"), [
    ({"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
    ({"num_class_embeds": 3}, "none for an image without a label"),
    ({"out_channels": 5}, "3 channels in and 5 out"),
])  # fmt: skip
def test_a_unet_that_is_no_denoiser_of_ours_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        read_pipeline(save_unet(tmp_path, **options))


def test_missing_and_damaged_weights(unet_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(unet_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.load_file(weights)
    del tensors["conv_in.weight"]
    safetensors.save_file(tensors, weights)
    with pytest.raises(UserError, match=r"1 weights are missing, such as conv_in\.weight"):
        read_pipeline(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="diffusers cannot read it"):
        read_pipeline(folder)
    weights.unlink()
    with pytest.raises(UserError, match="diffusers cannot read it"):
        read_pipeline(folder)


def test_without_diffusers_it_says_what_to_install(unet_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-diffusers\.txt"):
        read_pipeline(unet_folder)
