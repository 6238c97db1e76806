"""Weighted k-nearest neighbours: what the features say with nothing fitted."""

from torch import Tensor
from torch.nn import functional as F

from support.errors import UserError

KS = (20, 200)  # DINO's choice and that of Wu et al.
TEMPERATURE = 0.07
SIMILARITIES = 2**24  # held in memory at a time


def check_neighbours(n: int) -> None:
    """Raises UserError if n images, those of the smaller bank, are too few for every k of KS."""
    if n < min(KS):
        raise UserError(
            f"k-NN of {min(KS)} neighbours: there are only {n} images to find: give more "
            "(--n_train), or take --protocol cached"
        )


def knn_accuracies(
    bank: Tensor, y_bank: Tensor, x: Tensor, y: Tensor, n_classes: int, ks: tuple[int, ...] = KS
) -> dict[int, float]:
    """{k: the part of the rows of x: (N, D) whose class y: (N,) their neighbours vote for}.

    The k rows of bank: (M, D) with the highest cosine to a row vote for their class with the
    weight exp(cosine / 0.07) (Wu et al. 2018, arXiv 1805.01978). A k of more rows than the
    bank has is left out, see `check_neighbours`.
    """
    ks = [k for k in ks if k <= len(bank)]
    most = max(ks)
    bank = F.normalize(bank, dim=1)
    correct = dict.fromkeys(ks, 0)
    rows = max(1, SIMILARITIES // len(bank))
    for part, truth in zip(x.split(rows), y.split(rows), strict=True):
        cosine, nearest = (F.normalize(part, dim=1) @ bank.T).topk(most, dim=1)
        # over the largest: the same votes up to a factor, and no overflow
        weight = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
        for k in ks:
            votes = weight.new_zeros(len(part), n_classes)
            votes.scatter_add_(1, y_bank[nearest[:, :k]], weight[:, :k])
            correct[k] += (votes.argmax(1) == truth).sum().item()
    return {k: n / len(x) for k, n in correct.items()}
