"""Non-leaky augmentation: geometric transforms of the training images that the network is told.

Written from the description in Karras et al. 2022 (arXiv 2206.00364), appendix F.2.
"""

import functools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from config.schema import AUGMENT_LABELS as LABELS

STRENGTH = 0.2  # scales are 2^(STRENGTH a), a ~ N(0, 1)
SHIFT = 1 / 8  # of the width or height, per unit of a
RADIUS = 5  # of the half-band filter, in samples at twice the resolution; odd

# --- what is done to each image


@dataclass(frozen=True)
class Transforms:
    """One transform per image, applied in the order of the fields; all zeros: none.

    float32 (N,), `shift` (N, 2). Angles are in radians, from the x axis (right) towards the y axis
    (down); scales, rotation and stretch are about the centre of the image.
    """

    x_flip: Tensor  # 0 or 1
    y_flip: Tensor  # 0 or 1
    scale: Tensor  # a: enlarges by 2^(0.2 a)
    angle: Tensor  # of the rotation, in [-pi, pi)
    stretch: Tensor  # a: enlarges by 2^(0.2 a) along the axis, shrinks by as much across it
    axis: Tensor  # angle of that axis, in [-pi/2, pi/2)
    shift: Tensor  # a of the width (to the right) and of the height (down), in eighths of it

    def rows(self, share: slice) -> "Transforms":
        """Those of the images in `share`."""
        return Transforms(
            **{field.name: getattr(self, field.name)[share] for field in fields(self)}
        )


def draw_transforms(n: int, prob: float, draw: torch.Generator, flip: bool = True) -> Transforms:
    """Transforms of n images, on the device of `draw`, which always moves on by as many numbers.

    A horizontal flip has probability 1/2, or 0 without `flip`, a vertical one prob / 2, each other
    part `prob`. An axis is a line, so half a turn covers all, and the labels tell a stretch along
    one axis from a squeeze along the opposite.
    """
    options = {"generator": draw, "device": draw.device}
    on = torch.rand(5, n, **options) < prob
    u = torch.rand(5, n, **options)
    a = torch.randn(4, n, **options)
    return Transforms(
        x_flip=((u[0] < 0.5) & flip).float(),
        y_flip=((u[1] < 0.5) & on[0]).float(),
        scale=a[0] * on[1],
        angle=(2 * u[2] - 1) * math.pi * on[2],
        stretch=a[1] * on[3],
        axis=(u[3] - 0.5) * math.pi * (u[4] < 0.5),
        shift=(a[2:] * on[4]).T,
    )


def labels(t: Transforms) -> Tensor:
    """(N, LABELS): what the network is told, all zero for an untouched image.

    The flips, a of the scale, (cos - 1, sin) of the rotation, a (cos, sin) of the stretch's axis,
    the two a of the shift. They determine the transform.
    """
    columns = [
        t.x_flip, t.y_flip, t.scale, t.angle.cos() - 1, t.angle.sin(),
        t.stretch * t.axis.cos(), t.stretch * t.axis.sin(), *t.shift.unbind(1),
    ]  # fmt: skip
    return torch.stack(columns, 1)


def matrices(t: Transforms, height: int, width: int) -> Tensor:
    """(N, 3, 3): where a point (x, y, 1) of the flipped image comes to lie, in pixels from the
    centre. Exactly the identity for an image that is only flipped."""
    cos, sin = t.angle.cos(), t.angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], 1)
    k = math.log(2) * STRENGTH * t.stretch
    along = k.sinh() * (2 * t.axis).cos()
    across = k.sinh() * (2 * t.axis).sin()
    stretch = torch.stack([k.cosh() + along, across, across, k.cosh() - along], 1)
    scale = torch.exp2(STRENGTH * t.scale).view(-1, 1, 1)
    matrix = torch.eye(3, device=t.scale.device).repeat(len(t.scale), 1, 1)
    matrix[:, :2, :2] = scale * (stretch.view(-1, 2, 2) @ rotation.view(-1, 2, 2))
    matrix[:, :2, 2] = t.shift * t.shift.new_tensor([SHIFT * width, SHIFT * height])
    return matrix


# --- the images


@torch.no_grad()
def augment(
    x0: Tensor,
    prob: float,
    draw: torch.Generator,
    batch_size: int | None = None,
    share: slice = slice(None),
    flip: bool = True,
) -> tuple[Tensor, Tensor]:
    """x0: (N, C, H, W) float32 -> augmented images and their labels (N, LABELS), on x0's device.

    `draw` is of that device. What is done depends on it and on the place in the batch alone; of
    several processes, each gives its `share` of a global batch of `batch_size` images. At prob 0
    nothing happens, not even the horizontal flip. Images that are only flipped keep their values;
    resampling may leave [-1, 1] a little, as band-limited images do at sharp edges. Without `flip`
    none is mirrored.
    """
    if not prob:
        return x0, x0.new_zeros(len(x0), LABELS)
    transforms = draw_transforms(batch_size or len(x0), prob, draw, flip).rows(share)
    return transform(x0, transforms), labels(transforms)


def transform(x: Tensor, t: Transforms) -> Tensor:
    """x: (N, C, H, W) -> the same with t applied; bit for bit x, or its mirror image, where
    nothing but flips applies."""
    x = torch.where(_per_image(t.x_flip > 0), x.flip(-1), x)
    x = torch.where(_per_image(t.y_flip > 0), x.flip(-2), x)
    matrix = matrices(t, *x.shape[-2:])
    moved = (matrix != torch.eye(3, device=x.device)).flatten(1).any(1)
    return torch.where(_per_image(moved), resample(x, matrix), x)


def resample(x: Tensor, matrix: Tensor) -> Tensor:
    """x: (N, C, H, W), H, W >= 2, moved by matrix (N, 3, 3), as `matrices` gives it.

    The image goes on beyond its borders by reflection at the outermost pixels. It is interpolated
    to twice the resolution, sampled there, and low-pass filtered on the way back, which keeps
    what the transform lifts beyond the pixels' band from folding back. Every step is exact at the
    samples themselves: shifts by whole pixels and quarter turns lose nothing but rounding.
    """
    n, c, height, width = x.shape
    fine = _interpolation(height, x.device) @ x @ _interpolation(width, x.device).T
    # In units of half the image, as grid_sample wants it, from those of half the output, which
    # has a margin for the low-pass filter.
    size = x.new_tensor([width - 1, height - 1])
    scales = torch.cat([size + 2 * RADIUS, x.new_tensor([2])]) / size[:, None]
    theta = _inverse(matrix) * scales
    shape = (n, c, *(2 * side - 1 + 4 * RADIUS for side in (height, width)))
    grid = F.affine_grid(theta, shape, align_corners=True)
    mode = "bilinear" if x.device.type == "mps" else "bicubic"  # MPS has no bicubic, PyTorch 2.6
    fine = F.grid_sample(fine, grid, mode, padding_mode="reflection", align_corners=True)
    return _decimation(height, x.device) @ fine @ _decimation(width, x.device).T


def _inverse(matrix: Tensor) -> Tensor:
    """(N, 3, 3) affine -> the first two rows of its inverse, (N, 2, 3). In closed form, as the
    general one may wait for the device."""
    a, b, c, d = matrix[:, :2, :2].flatten(1).unbind(1)
    inverse = torch.stack([d, -b, -c, a], 1) / (a * d - b * c)[:, None]
    inverse = inverse.view(-1, 2, 2)
    return torch.cat([inverse, -inverse @ matrix[:, :2, 2:]], 2)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


# --- to twice the resolution and back, along one axis


def _half_band() -> Tensor:
    """(2 RADIUS + 1,) a sinc at half the band in a Lanczos window, of gain 1: it and its mirror
    image in frequency add up to 1, H(w) + H(w + pi) = 1, so 2 H interpolates exactly."""
    k = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    taps = torch.sinc(k / 2) * torch.sinc(k / (RADIUS + 1)) / 2
    taps[RADIUS] = 0  # the other even ones are zero already, but for rounding
    taps = torch.where(k % 2 == 0, 0.0, taps / (2 * taps.sum()))
    taps[RADIUS] = 0.5
    return taps


@functools.cache
def _interpolation(n: int, device: torch.device) -> Tensor:
    """(2 n - 1, n): n samples and the points halfway between, reflected beyond the ends."""
    places = torch.arange(-RADIUS, n + RADIUS)
    weights = _band_matrix(torch.arange(2 * n - 1), 2 * places, 2 * _half_band())
    period = 2 * (n - 1)
    folded = places % period
    folded = torch.minimum(folded, period - folded)
    matrix = weights.new_zeros(2 * n - 1, n).index_add_(1, folded, weights)
    return matrix.float().to(device)


@functools.cache
def _decimation(n: int, device: torch.device) -> Tensor:
    """(n, 2 n - 1 + 4 RADIUS): low-pass filters samples at twice the resolution, with a margin of
    2 RADIUS at both ends, and keeps every other one.

    The filter is G = H (3 - 2 H), for then G H = 3 H^2 - 2 H^3 is again half-band, so that what
    was interpolated with H comes back unchanged.
    """
    h = _half_band()
    g = -2 * F.conv1d(h.view(1, 1, -1), h.view(1, 1, -1), padding=2 * RADIUS).flatten()
    g[RADIUS:-RADIUS] += 3 * h
    fine = torch.arange(-2 * RADIUS, 2 * n - 1 + 2 * RADIUS)
    return _band_matrix(2 * torch.arange(n), fine, g).float().to(device)


def _band_matrix(rows: Tensor, columns: Tensor, taps: Tensor) -> Tensor:
    """(rows, columns): the tap, counted from the middle one, that lies between the two places."""
    radius = len(taps) // 2
    distance = rows[:, None] - columns
    return torch.where(
        distance.abs() <= radius, taps[distance.clamp(-radius, radius) + radius], 0.0
    )
