"""What World2Act optimises (METHOD section 3): masked similarity, Eq. 1, cosine and decoding losses.

Pairs of chunks come as e_v (B, K, D) and e_a (B, K, D) with bool masks (B, K). A masked chunk may hold anything, NaN too:
it is replaced by zeros before it is used, so it changes neither a loss nor a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Contrastive:
    """Settings of the contrastive loss. tau: temperature (paper 0.1; the authors' code 0.07)."""

    tau: float = 0.1

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau: must be > 0, got {self.tau}")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, K) over True entries of `mask` (B, K); 0 when there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def unit(embedding: Tensor, mask: Tensor) -> Tensor:
    """Rows of length 1 over D; masked rows 0. (B, K, D), (B, K) -> (B, K, D)."""
    return F.normalize(torch.where(mask[..., None], embedding, 0.0), dim=-1)


def similarity(e_v: Tensor, e_a: Tensor, mask_v: Tensor, mask_a: Tensor) -> Tensor:
    """s(i, j) = mean over chunks t that both have of cos(e_v[i, t], e_a[j, t]); (B, B), 0 where they share no chunk."""
    cosines = torch.einsum("ikd,jkd->ij", unit(e_v, mask_v), unit(e_a, mask_a))
    shared = torch.einsum("ik,jk->ij", mask_v.float(), mask_a.float())
    return cosines / shared.clamp_min(1)


def info_nce(scores: Tensor, candidates: Tensor, tau: float) -> Tensor:
    """Eq. 1: both directions of InfoNCE over similarities `scores` (B, B), positives on the diagonal, mean over i.

    candidates: bool (B, B), True where j may stand in i's denominator (symmetric; the diagonal decides whether row i counts).
    Rows without a negative give log 1 = 0, not an error.
    """
    valid = torch.diagonal(candidates)
    allowed = candidates | torch.eye(
        len(scores), dtype=torch.bool, device=scores.device
    )  # a row that does not count must still be finite
    logits = torch.where(allowed, scores / tau, -torch.inf)
    positives = torch.diagonal(logits)
    per_row = (torch.logsumexp(logits, 1) - positives) + (torch.logsumexp(logits, 0) - positives)
    return torch.where(valid, per_row, 0.0).sum() / valid.sum().clamp_min(1)


def contrastive_loss(e_v: Tensor, e_a: Tensor, mask: Tensor, groups: Tensor, settings: Contrastive) -> Tensor:
    """Eq. 1 over a batch: negatives of i are the rows j with groups[j] == groups[i] (int (B,); all equal in Stage 1)."""
    present = mask.any(1)
    candidates = (groups[:, None] == groups[None, :]) & present[:, None] & present[None, :]
    return info_nce(similarity(e_v, e_a, mask, mask), candidates, settings.tau)


def positive_cosine(e_v: Tensor, e_a: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of the true pairs (paper Fig. 5a); scalar."""
    return masked_mean((unit(e_v, mask) * unit(e_a, mask)).sum(-1), mask)


def decode_loss(decoded: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of chunks (B, K, M, A), both normalised, over unmasked chunks (L_rec of METHOD section 3)."""
    keep = mask[..., None, None]
    error = torch.where(keep, decoded, 0.0) - torch.where(keep, actions, 0.0)
    return masked_mean(error.square().flatten(2).mean(-1), mask)


def r2(predicted: Tensor, true: Tensor, mask: Tensor) -> float:
    """Share of the variance of `true` (..., M, A) that `predicted` explains over unmasked chunks; 1 is perfect."""
    p, t = predicted[mask].double(), true[mask].double()
    return 1.0 - float((p - t).square().sum() / (t - t.mean((0, 1))).square().sum().clamp_min(1e-12))
