"""Folders that `save_pretrained` of the library diffusers wrote, read as models of this project.

model_index.json names the parts: `unet` or `transformer`, `scheduler`, for latent models `vae`;
each has a folder, but the oldest models have all files in one.
What a scheduler says of the training becomes our DDPM section, the network an F: see
`diffusers_networks`. How theirs sample (steps, spacing, clipping) is left to our samplers.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from config import Config, config_differences, parse_config
from model.diffusers_networks import Codec, DiffusersNet
from support.errors import UserError
from support.files import DAMAGED, has_form, read_json

INDEX = "model_index.json"
NETWORKS = {  # by the class that the index names; DiT was first published under the second name
    "UNet2DModel": "UNet2DModel",
    "DiTTransformer2DModel": "DiTTransformer2DModel",
    "Transformer2DModel": "DiTTransformer2DModel",
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
PARTS = {"unet", "transformer", "scheduler", "vae"}
UNREADABLE = (*DAMAGED, ArithmeticError, AssertionError, ImportError)  # of from_pretrained
AGAIN = "fetch it again"


def is_diffusers(path: Path) -> bool:
    """Whether `path` is a folder that a pipeline of diffusers was saved to."""
    return (path / INDEX).is_file()


def read_plan(path: Path) -> tuple[dict[str, str], dict]:
    """What is known without the weights: {part: the name of its class}, and the `diffusion`
    section of a config. Raises UserError for a part, schedule or prediction that is not read here.
    """
    return _parts(path), read_schedule(_folder_of(path, "scheduler") / "scheduler_config.json")


def _parts(path: Path) -> dict[str, str]:
    index = read_json(path / INDEX, advice=AGAIN)
    classes = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) > 1}
    parts = {part: str(kind) for part, kind in classes.items() if kind}
    part = "transformer" if "transformer" in parts else "unet"
    kind, others = parts.get(part), sorted(set(parts) - PARTS)
    if kind not in NETWORKS or others:
        found = f"{part} {kind}" if kind not in NETWORKS else f"part {others[0]}"
        raise UserError(
            f"{path}: its {found} is not read here: a pipeline has to be of a UNet2DModel or a "
            "DiTTransformer2DModel, a scheduler, and for latents an AutoencoderKL"
        )
    return parts


def read_pipeline(path: Path) -> tuple[DiffusersNet, dict]:
    """The networks on the CPU, and what a config says of such a model: its MODEL_KEYS.

    Raises UserError where diffusers is not installed, and for a kind of model, schedule or
    prediction that is not read here.
    """
    parts, diffusion = read_plan(path)
    network_part = "transformer" if "transformer" in parts else "unet"
    network = _from_pretrained(_folder_of(path, network_part), NETWORKS[parts[network_part]])
    vae = None
    if "vae" in parts:
        vae = _from_pretrained(_folder_of(path, "vae"), "AutoencoderKL")
    shape = _image_shape(_folder_of(path, network_part), network)
    pixel_shape = shape if vae is None else _pixel_shape(path, shape, vae)
    with _reading(path):
        net = DiffusersNet(network, diffusion, Codec(pixel_shape, vae))
        _try_out(net, shape)
    facts = {
        "model_type": "DDPM", "net_type": "diffusers", "diffusion": diffusion,
        "network": {"image_shape": shape, "pixel_shape": pixel_shape}, "cond_drop_prob": 0.0,
    }  # fmt: skip
    return net, facts


def config_of_pipeline(
    facts: dict, path: Path, config: Config | None, overrides: list[str]
) -> Config:
    """The config of a pipeline's model, of which `facts` is what it says itself.

    The rest is that of `config`, if there is one; of a config for a network made here, the folder
    of results is not taken, since it has the results of that network. Raises UserError if
    `config` or `overrides` say something else than the facts.
    """
    given: dict = {"dataset": ""} if config is None else config.model_dump(mode="json")
    if given.get("net_type") != facts["net_type"]:
        given = {key: value for key, value in given.items() if key not in facts}
        dataset = parse_config(facts | given, overrides, source=str(path)).dataset
        given["save_dir"] = "_".join(filter(None, ("output", path.resolve().name, dataset)))
    told = parse_config(facts | given, overrides, source=str(path))
    itself = parse_config(told.model_dump(mode="json") | facts, source=str(path))
    if differences := config_differences(told, itself):
        lines = "\n  ".join(differences)
        raise UserError(f"{path}: the model itself says otherwise:\n  {lines}")
    return told


def read_schedule(path: Path) -> dict:
    """The `diffusion` section of a config for a scheduler_config.json.

    Raises UserError for a schedule or a prediction that is not read here.
    """
    theirs = read_json(path, advice=AGAIN)
    schedule = str(theirs.get("beta_schedule"))
    objective = str(theirs.get("prediction_type", "epsilon"))
    for key, value, known in (
        ("beta_schedule", schedule, SCHEDULES), ("prediction_type", objective, OBJECTIVES),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{path}: {key} {value} is not read here: there are {', '.join(known)}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if theirs.get(key):
            raise UserError(f"{path}: {key} is not read here: the betas have to be those of a row")
    section = {
        "n_T": theirs.get("num_train_timesteps", 1000),
        "schedule": SCHEDULES[schedule],
        "betas": (theirs.get("beta_start", 1e-4), theirs.get("beta_end", 0.02)),
        "objective": OBJECTIVES[objective],
    }
    parse_config({"diffusion": section}, source=str(path))  # it refuses what is no number
    return section


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around what diffusers does with a folder: whatever stops it becomes a UserError."""
    try:
        yield
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: diffusers cannot read it: {reason}") from None


def _try_out(net: DiffusersNet, shape: tuple[int, int, int]) -> None:
    """A pass without numbers: some mistakes in a network's config show only there."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    weights = {name: tensor.to("meta") for name, tensor in tensors}
    x, c_noise = torch.zeros(1, *shape, device="meta"), torch.ones(1, device="meta")
    torch.func.functional_call(net, weights, (x, c_noise))


def _folder_of(path: Path, part: str) -> Path:
    return path / part if (path / part).is_dir() else path


def _from_pretrained(path: Path, kind: str) -> nn.Module:
    """A part of the pipeline with all its weights, from its folder. Raises UserError."""
    try:
        import diffusers
    except ImportError:
        raise UserError(
            f"{path}: a model of diffusers, which is not installed: "
            "pip install -r requirements-diffusers.txt"
        ) from None
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of what is checked below
    try:
        with _reading(path):
            network, loading = getattr(diffusers, kind).from_pretrained(
                str(path), local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    finally:
        diffusers.utils.logging.set_verbosity(level)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{path}: {len(missing)} weights are missing, such as {missing[0]}")
    return network.float()


def _image_shape(path: Path, network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of what the network denoises. Raises UserError for one that is not read here."""
    config = network.config
    size = config.sample_size
    if size is None:
        raise UserError(f"{path / 'config.json'}: no sample_size: add the size of its images there")
    sizes = [size, size] if isinstance(size, int) else size
    if not has_form(sizes, [int]) or len(sizes) != 2:
        raise UserError(f"{path / 'config.json'}: sample_size {size}: one number, or two")
    height, width = sizes
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional":
        raise UserError(f"{path}: time_embedding_type {embedding} is not read here: positional is")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise UserError(
            f"{path}: a UNet2DModel of classes, which has none for an image without a label"
        )
    channels, out = config.in_channels, config.out_channels or config.in_channels
    if out not in (channels, 2 * channels):
        raise UserError(f"{path}: {channels} channels in and {out} out: not a denoiser")
    return channels, height, width


def _pixel_shape(path: Path, shape: tuple[int, int, int], vae: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images whose latents have the shape `shape`. Raises UserError."""
    channels, height, width = shape
    if vae.config.latent_channels != channels:
        raise UserError(
            f"{path}: its vae makes {vae.config.latent_channels} channels, its network takes "
            f"{channels}"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.in_channels, factor * height, factor * width
