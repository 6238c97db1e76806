"""The configuration: one pydantic model per section of the YAML, and the only place with defaults.

The keys are those of the reference implementation (FutureXiang/ddae), so its files load as they
are. An unknown key is an error (`extra="forbid"`); `config.load_config` words it for people.
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

AUGMENT_LABELS = 9  # what the non-leaky augmentation tells the network
LONGEST_NAME, LONGEST_PATH = 255, 3_000  # bytes; of a path 4,096 with what jobs write below it
NORM_GROUPS = 32  # groups of every norm inside a residual or attention block

# What PyTorch can still count the elements of; memory ends far below.
Width = Annotated[PositiveInt, Field(le=65_536)]  # of images, in pixels, and of layers
Factor = Annotated[PositiveInt, Field(le=256)]  # of a width
Count = Annotated[PositiveInt, Field(le=1_000_000)]


class Section(BaseModel):
    """A section of the YAML: it refuses an unknown key, a yes for a number, 1e3 for a name, and
    infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(),
        allow_inf_nan=False, coerce_numbers_to_str=True,
    )  # fmt: skip

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_was_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1; somebody who writes `n_epoch: yes` does not mean 1. Nor is
        1000.0 the name that somebody meant who writes `save_dir: 1e3`."""
        parts = value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[info.field_name].annotation
        if any(isinstance(part, bool) for part in parts) and not _takes(bool, annotation):
            raise ValueError(f"expected a value, found {value} (YAML reads yes and no so)")
        if isinstance(value, float) and _takes(str, annotation) and not _takes(float, annotation):
            raise ValueError(f"expected a name, found the number {value}: put it in quotes")
        return value


def _takes(kind: type, annotation: Any) -> bool:
    return annotation in (kind, Any) or any(_takes(kind, part) for part in get_args(annotation))


class Diffusion(Section):
    """What every process has. `augment_prob` is that of the non-leaky augmentation; 0: none."""

    augment_prob: float = Field(0.0, ge=0, le=1)


class DDPMDiffusion(Diffusion):
    """DDPM (Ho et al. 2020): n_T noise levels, what the network predicts, and how errors weigh."""

    n_T: Count = Field(1000, ge=2)
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    betas: tuple[float, float] = (1e-4, 0.02)  # of the linear ones: the first and the last
    objective: Literal["eps", "x0", "v"] = "eps"
    weighting: Literal["simple", "min_snr"] = "simple"
    gamma: PositiveFloat = 5.0  # of min_snr
    # what noise is trained: t uniform in 1 .. n_T or in (0, n_T), or sigma log-normal as in EDM
    time: Literal["discrete", "continuous", "lognormal"] = "discrete"
    p_mean: float = -1.2  # of ln(sigma) in training, where time is lognormal
    p_std: PositiveFloat = 1.2

    @field_validator("betas")
    @classmethod
    def _betas_in_order(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not 0 < betas[0] < betas[1] < 1:
            raise ValueError("betas must satisfy 0 < first < second < 1")
        return betas


class EDMDiffusion(Diffusion):
    """EDM (Karras et al. 2022, table 1): log-normal sigma in training, a rho grid and churn."""

    sigma_data: PositiveFloat = 0.5  # standard deviation of the images in [-1, 1]
    p_mean: float = -1.2  # of ln(sigma) in training
    p_std: PositiveFloat = 1.2
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0
    S_min: NonNegativeFloat = 0.0  # churn only where S_min <= sigma <= S_max
    S_max: Annotated[NonNegativeFloat, AllowInfNan(True)] | None = None  # None: no bound
    S_noise: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _sigmas_in_order(self) -> "EDMDiffusion":
        if not self.sigma_min < self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        return self


class Network(Section):
    """The UNet, of which DDPM's and DDPM++'s networks are settings."""

    image_shape: tuple[Width, Width, Width] = (3, 32, 32)  # C, H, W
    n_channels: Width = 64
    ch_mults: tuple[Factor, ...] = (1, 2, 2, 2)  # one per resolution, from the top
    is_attn: tuple[bool, ...] = (False, False, False, False)
    dropout: float = Field(0.1, ge=0, lt=1)
    n_blocks: int = Field(1, ge=1, le=100)  # of a size whose names below fit into memory
    use_res_for_updown: bool = False
    augment_dim: int = Field(0, ge=0, le=65_536)
    attn_channels_per_head: PositiveInt | None = None  # None: one head over all channels
    zero_init: bool = False  # second convolutions start at 0: each residual block does nothing
    self_condition: str | None = None  # the decoder block whose features guide those after it
    self_condition_gate: bool = False  # scale that guidance by a learned function of the noise
    resizes: ClassVar[bool] = False  # whether images of another size are resized, not refused

    @property
    def block_names(self) -> list[str]:
        """The decoder blocks, out_1 .. out_n from the lowest resolution up."""
        return [f"out_{i + 1}" for i in range(len(self.ch_mults) * (self.n_blocks + 1))]

    @model_validator(mode="after")
    def _fits_together(self) -> "Network":
        if not self.ch_mults:
            raise ValueError("ch_mults must name at least one resolution")
        if len(self.ch_mults) != len(self.is_attn):
            raise ValueError(
                f"ch_mults has {len(self.ch_mults)} entries and is_attn {len(self.is_attn)}: "
                "give one of each per resolution"
            )
        if self.n_channels % NORM_GROUPS:
            raise ValueError(
                f"n_channels {self.n_channels} is not divisible by the {NORM_GROUPS} groups of "
                f"the group norms: take a multiple of {NORM_GROUPS}"
            )
        factor = 2 ** (len(self.ch_mults) - 1)
        _, height, width = self.image_shape
        if height % factor or width % factor:
            raise ValueError(
                f"image_shape {height}x{width} cannot be halved {len(self.ch_mults) - 1} times: "
                f"use multiples of {factor}, or fewer ch_mults"
            )
        head = self.attn_channels_per_head
        if head and any(self.n_channels * mult % head for mult in self.ch_mults):
            raise ValueError(f"attn_channels_per_head {head} does not divide every level's width")
        return self

    @model_validator(mode="after")
    def _self_condition_has_blocks_after_it(self) -> "Network":
        able = self.block_names[:-1]
        if self.self_condition is not None and self.self_condition not in able:
            raise ValueError(
                f"self_condition {self.self_condition!r} is no block with others after it: there "
                f"are {', '.join(able)}"
            )
        if self.self_condition_gate and self.self_condition is None:
            raise ValueError("self_condition_gate needs self_condition, the block that it scales")
        return self

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """C, H, W of the images: what it denoises are images."""
        return self.image_shape


class DiffusersNetwork(Section):
    """What is known here of a network of diffusers, whose own folder has the rest."""

    image_shape: tuple[Width, Width, Width]  # C, H, W of what it denoises
    pixel_shape: tuple[Width, Width, Width]  # of images; others are resized
    resizes: ClassVar[bool] = True


class Linear(Section):
    """The linear probe: which features, and how the heads are fitted."""

    n_epoch: PositiveInt = 15
    batch_size: PositiveInt = 128
    lrate: PositiveFloat = 1e-3
    timestep: PositiveInt = 21
    blockname: str = "out_2"


class Distill(Section):
    """Self-distillation, see training/distill.py: a second loss, off while `loss` is None."""

    loss: Literal["infonce", "regression", "dispersive", "dispersive_cosine"] | None = None
    block: str = "out_2"  # whose features it is about
    weight: PositiveFloat = 0.1  # of it, beside the denoising loss
    temperature: PositiveFloat = 0.2  # of infonce and dispersive_cosine
    queue: int = Field(4096, ge=0, le=1_000_000)  # keys of earlier images, for infonce
    tau: PositiveFloat = 0.5  # of dispersive, a squared distance per channel
    projector_width: Width = 256  # hidden units
    # the lowest and the highest t of the teacher's images; None: those of the probe's grid
    teacher_timesteps: tuple[PositiveInt, PositiveInt] | None = None
    teacher_color: float = Field(0.0, ge=0, le=1)  # strength of its colour augmentation; 0: none
    teacher_augment: float = Field(0.0, ge=0, le=1)  # probability of its geometric augmentation

    @field_validator("teacher_timesteps")
    @classmethod
    def _timesteps_in_order(cls, timesteps: tuple[int, int] | None) -> tuple[int, int] | None:
        if timesteps and timesteps[0] > timesteps[1]:
            raise ValueError("teacher_timesteps must be the lowest t and the highest")
        return timesteps


class Config(Section):
    """What every experiment has; `PROCESSES` holds the classes that are whole."""

    dataset: str = "cifar10"
    classes: Count = 10
    model_type: str
    net_type: Literal["UNet"] = "UNet"
    diffusion: Diffusion
    network: Network = Network()

    n_epoch: PositiveInt = 60
    n_step: NonNegativeInt = 0  # optimizer steps that end the run, whatever n_epoch; 0: by epochs
    batch_size: PositiveInt = 64  # images per forward, over all processes
    accumulate: PositiveInt = 1  # batches per optimizer step
    lrate: PositiveFloat = 1e-4
    warm_epoch: NonNegativeInt = 13
    warm_step: NonNegativeInt = 0  # optimizer steps of linear warm-up, on top of warm_epoch
    lr_decay: Literal["none", "linear", "cosine"] = "none"  # to 0 at the last step of the run
    decay_from: float = Field(0.0, ge=0, lt=1)  # the part of the run before the decay begins
    start_from: str | None = None  # whose weights a run begins with, as --ckpt takes it
    load_epoch: int = Field(-1, ge=-1)  # start from model_<load_epoch>.pth; -1: do not
    cond_drop_prob: float = Field(0.0, ge=0, lt=1)  # label dropout; above 0: class-conditional
    flip: bool = True
    ema: float = Field(0.9999, ge=0, lt=1)
    grad_clip: Annotated[PositiveFloat, AllowInfNan(True)] = 1.0
    optim: Literal["Adam", "AdamW", "SGD"] = "Adam"
    optim_args: dict[str, Any] = {}
    seed: NonNegativeInt = 0
    distill: Distill = Distill()

    n_sample: Count = 30  # images in the grid drawn during training
    sample_every: PositiveInt = 5  # epochs between grids and test losses
    save_every: PositiveInt = 10  # epochs between model_<epoch>.pth
    save_dir: str = "ddae_output"
    save_model: bool = True  # False: keep only latest.pth and best.pth

    linear: Linear = Linear()

    @property
    def images_per_step(self) -> int:
        """Of an optimizer step, over all processes."""
        return self.batch_size * self.accumulate

    @field_validator("save_dir")
    @classmethod
    def _a_folder_can_be_called_so(cls, save_dir: str) -> str:
        names = save_dir.encode().split(b"/")
        if max(map(len, names)) > LONGEST_NAME or len(save_dir.encode()) > LONGEST_PATH:
            raise ValueError(f"too long: a name takes {LONGEST_NAME} bytes at most")
        return save_dir

    @model_validator(mode="after")
    def _augmentation_has_its_labels(self) -> "Config":
        if self.diffusion.augment_prob and self.network.augment_dim != AUGMENT_LABELS:
            raise ValueError(
                f"diffusion.augment_prob needs network.augment_dim {AUGMENT_LABELS}: the network "
                "is told how its input was augmented"
            )
        return self

    @model_validator(mode="after")
    def _dispersive_sees_whole_steps(self) -> "Config":
        if self.distill.loss in _PAIRS and self.accumulate > 1:
            raise ValueError(
                f"distill.loss {self.distill.loss} compares the images of one forward, which "
                "depend on the number of processes where accumulate is above 1: set accumulate to 1"
            )
        return self


class DDPMConfig(Config):
    """An experiment with DDPM."""

    model_type: Literal["DDPM"] = "DDPM"
    diffusion: DDPMDiffusion = DDPMDiffusion()


class EDMConfig(Config):
    """An experiment with EDM."""

    model_type: Literal["EDM"] = "EDM"
    diffusion: EDMDiffusion = EDMDiffusion()


class DiffusersConfig(DDPMConfig):
    """Of a model that a folder of diffusers holds, see model/diffusers_checkpoints.py."""

    net_type: Literal["diffusers"] = "diffusers"
    network: DiffusersNetwork


_TEACHER = ("infonce", "regression")
_PAIRS = ("dispersive", "dispersive_cosine")
NEEDS = {  # {setting: (another, its values without which the first changes nothing)}
    "decay_from": ("lr_decay", ("linear", "cosine")),
    "diffusion.betas": ("diffusion.schedule", ("linear", "scaled_linear")),
    "diffusion.gamma": ("diffusion.weighting", ("min_snr",)),
    "diffusion.p_mean": ("diffusion.time", ("lognormal",)),  # EDM has no other
    "diffusion.p_std": ("diffusion.time", ("lognormal",)),
    "distill.block": ("distill.loss", (*_TEACHER, *_PAIRS)),
    "distill.weight": ("distill.loss", (*_TEACHER, *_PAIRS)),
    "distill.tau": ("distill.loss", ("dispersive",)),
    "distill.temperature": ("distill.loss", ("infonce", "dispersive_cosine")),
    "distill.queue": ("distill.loss", ("infonce",)),
    "distill.projector_width": ("distill.loss", _TEACHER),
    "distill.teacher_timesteps": ("distill.loss", _TEACHER),
    "distill.teacher_color": ("distill.loss", _TEACHER),
    "distill.teacher_augment": ("distill.loss", _TEACHER),
}
FOREIGN_NETWORKS = {"diffusers": DiffusersConfig}  # by net_type; they decide before model_type
PROCESSES = {"DDPM": DDPMConfig, "EDM": EDMConfig}  # by model_type; the first is the default
