"""Linear heads: a bank trained together by Adam, and the exact optimum by L-BFGS."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.probe.cells import Cell
from utils import generator, log

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Head:
    """weight: (K, D), bias: (K,) -> logits x @ weight.T + bias."""

    weight: Tensor
    bias: Tensor

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The part of the rows of x: (N, D) whose largest logit is at y: (N,)."""
        return (self(x).argmax(1) == y).sum().item() / len(y)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, D) -> logits (N, K)."""
        return F.linear(x.to(self.weight), self.weight, self.bias)


class HeadBank(nn.Module):
    """Heads for many cells, `copies` of each; those of equal width are one batched product.

    widths: {cell: D}. Each head starts as torch.nn.Linear does, from (seed, cell) alone; the
    copies of a cell start equal.
    """

    def __init__(self, widths: dict[Cell, int], n_classes: int, copies: int, seed: int):
        super().__init__()
        self.copies, self.n_classes = copies, n_classes
        self.groups = [
            [cell for cell in widths if widths[cell] == width]
            for width in dict.fromkeys(widths.values())
        ]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for cells in self.groups:
            heads = [_initial_head(widths[cell], n_classes, seed, cell) for cell in cells]
            weight = torch.stack([head.weight for head in heads])[:, None]  # (cells, 1, K, D)
            bias = torch.stack([head.bias for head in heads])[:, None]
            self.weights.append(weight.repeat(1, copies, 1, 1))
            self.biases.append(bias.repeat(1, copies, 1))

    def forward(self, features: dict[Cell, Tensor]) -> Tensor:
        """{cell: (N, D)} -> logits (heads, N, copies, K)."""
        groups = zip(self.groups, self.weights, self.biases, strict=True)
        return torch.cat([_group_logits(features, *group) for group in groups])

    def loss(self, features: dict[Cell, Tensor], y: Tensor, seen: Tensor) -> Tensor:
        """The sum over all heads of each one's mean cross-entropy, so that none sees the others.

        seen: (N, copies), 1 where this copy learns from this image and 0 where it does not.
        """
        logits = self(features)
        targets = y[None, :, None].expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        mean = seen / seen.sum(dim=0).clamp(min=1)
        return (losses.view(targets.shape) * mean).sum()

    def heads(self) -> dict[Cell, list[Head]]:
        """{cell: its copies}, detached."""
        groups = zip(self.groups, self.weights, self.biases, strict=True)
        return {
            cell: [Head(weights[i, k].detach(), biases[i, k].detach()) for k in range(self.copies)]
            for cells, weights, biases in groups
            for i, cell in enumerate(cells)
        }


def _group_logits(
    features: dict[Cell, Tensor], cells: list[Cell], weight: Tensor, bias: Tensor
) -> Tensor:
    x = torch.stack([features[cell] for cell in cells])  # (cells, N, D)
    logits = torch.bmm(x, weight.flatten(1, 2).transpose(1, 2)) + bias.flatten(1)[:, None]
    return logits.unflatten(2, weight.shape[1:3])  # (cells, N, copies, K)


def _initial_head(width: int, n_classes: int, seed: int, cell: Cell) -> Head:
    draw = generator("cpu", seed, "head", cell.t, cell.block)
    bound = width**-0.5
    weight = torch.empty(n_classes, width).uniform_(-bound, bound, generator=draw)
    return Head(weight, torch.empty(n_classes).uniform_(-bound, bound, generator=draw))


def fit_logistic(x: Tensor, y: Tensor, n_classes: int, C: float = 1.0) -> Head:
    """Multinomial logistic regression: C * sum of cross-entropies + |w|^2 / 2.

    x: (N, D) float32, y: (N,) int64; w is the weight of the standardised x, the bias is not
    penalised. This is scikit-learn's LogisticRegression after StandardScaler, with its default
    C, which is weak for thousands of images. The head returned is for x as given.
    """
    l2 = 1 / (C * len(x))
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std <= 1e-6 * mean.abs()] = 1  # a constant feature: only rounding would be stretched
    z = (x - mean) / std
    # The Hessian is at most about (correlation + 10 l2) / 10: in coordinates where that is the
    # identity, L-BFGS needs tens of steps where standardised features take thousands.
    factor = torch.linalg.cholesky(_gram(z) + 10 * l2 * torch.eye(z.shape[1]).to(z.device))
    factor = factor.to(z)
    z = torch.linalg.solve_triangular(factor, z.T, upper=False).T.contiguous()
    u = torch.zeros(z.shape[1], n_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    penalised = torch.linalg.inv(factor.double()).T  # u -> weight of standardised x

    def objective() -> Tensor:
        # the mean in float64: the line search compares tiny differences
        losses = F.cross_entropy(z @ u.float() + bias.float(), y, reduction="none")
        return losses.double().mean() + l2 / 2 * (penalised @ u).square().sum()

    _minimise(objective, [u, bias])
    weight = (penalised @ u.detach()).T / std
    return Head(weight.float(), (bias.detach() - weight @ mean.double()).float())


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    lbfgs = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, history_size=20,
        tolerance_grad=3e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    lbfgs.step(closure)
    steepest = max(parameter.grad.abs().max().item() for parameter in parameters)
    if not steepest < 1e-4:
        log.info(f"note: a head had not converged when L-BFGS stopped (gradient {steepest:.1e})")


def _gram(z: Tensor) -> Tensor:
    """z.T @ z / N in float64, by parts that fit in memory."""
    gram = sum(part.double().T @ part.double() for part in z.split(4096))
    return gram / len(z)
