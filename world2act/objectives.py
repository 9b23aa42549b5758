"""What World2Act optimises (METHOD section 3): masked similarity, Eq. 1 and its ablations, cosine and decoding losses; and how
two time lines are matched.

Pairs of chunks come as e_v (B, K, D) and e_a (B, K, D) with bool masks (B, K). A masked chunk may hold anything, NaN too:
it is replaced by zeros before it is used, so it changes neither a loss nor a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["chunk", "global"]
Form = Literal["bi", "single", "marginal", "margin"]


def one_of(kind: Any, **values: str) -> None:
    """Raise ValueError naming each value that is none of the words of the Literal `kind`."""
    for name, value in values.items():
        if value not in get_args(kind):
            raise ValueError(f"{name}: must be one of {', '.join(get_args(kind))}, got {value!r}")


@dataclass(frozen=True)
class Contrastive:
    """Settings of the contrastive loss.

    tau: temperature (paper 0.1; the authors' code 0.07).
    similarity of two time lines: "chunk": mean of the cosines at the same index (paper); "global": cosine of their mean
    embeddings, which forgets the order (ablation, METHOD section 5).
    form: "bi": Eq. 1, both directions (paper); "single": video -> action alone (ablation). The paper's ablation "marginal" is a
    word without a formula, so both readings are here. "marginal": every chunk is a sample of its own, and its negatives are all
    other chunks of all rows, that is draws from the marginal distribution of chunks instead of whole time lines; both
    directions. "margin": no likelihood; each negative must stay `margin` (in cosine) below the positive, both directions.
    """

    tau: float = 0.1
    similarity: Similarity = "chunk"
    form: Form = "bi"
    margin: float = 0.2

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau: must be > 0, got {self.tau}")
        if not 0 < self.margin <= 2:
            raise ValueError(f"margin: must be in (0, 2], got {self.margin}")
        one_of(Similarity, similarity=self.similarity)
        one_of(Form, form=self.form)
        if self.form == "marginal" and self.similarity == "global":
            raise ValueError("similarity: form marginal compares single chunks, so global does not go with it")


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


def global_similarity(e_v: Tensor, e_a: Tensor, mask_v: Tensor, mask_a: Tensor) -> Tensor:
    """s(i, j) = cos of the mean embeddings of i's and of j's own chunks: (B, B), 0 where a row has no chunk."""
    pooled = []
    for embedding, mask in ((e_v, mask_v), (e_a, mask_a)):
        total = torch.where(mask[..., None], embedding, 0.0).sum(1)
        pooled.append(F.normalize(total / mask.sum(1).clamp_min(1)[:, None], dim=-1))
    return pooled[0] @ pooled[1].T


def info_nce(scores: Tensor, candidates: Tensor, tau: float, *, both: bool = True) -> Tensor:
    """Eq. 1: InfoNCE over similarities `scores` (N, N), video i, action j, positives on the diagonal, mean over i.

    both: sum the directions video -> action and action -> video; False: the first alone. candidates: bool (N, N), True where j
    may stand in i's denominator (symmetric; the diagonal decides whether row i counts). Rows without a negative give
    log 1 = 0, not an error.
    """
    valid = torch.diagonal(candidates)
    allowed = candidates | torch.eye(
        len(scores), dtype=torch.bool, device=scores.device
    )  # a row that does not count must still be finite
    logits = torch.where(allowed, scores / tau, -torch.inf)
    positives = torch.diagonal(logits)
    per_row = torch.logsumexp(logits, 1) - positives
    if both:
        per_row = per_row + (torch.logsumexp(logits, 0) - positives)
    return torch.where(valid, per_row, 0.0).sum() / valid.sum().clamp_min(1)


def margin_loss(scores: Tensor, candidates: Tensor, margin: float) -> Tensor:
    """max(0, margin - positive + negative), mean over the negatives of a row, both directions, mean over rows. As `info_nce`."""
    valid = torch.diagonal(candidates)
    negatives = candidates & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    positives = torch.diagonal(scores)
    hinges = (margin - positives[:, None] + scores).clamp_min(0) + (margin - positives[:, None] + scores.T).clamp_min(0)
    per_row = torch.where(negatives, hinges, 0.0).sum(1) / negatives.sum(1).clamp_min(1)
    return torch.where(valid, per_row, 0.0).sum() / valid.sum().clamp_min(1)


def contrastive_loss(e_v: Tensor, e_a: Tensor, mask: Tensor, groups: Tensor, settings: Contrastive) -> Tensor:
    """Eq. 1 over a batch, or the form that `settings` names.

    The negatives of i are the rows j with groups[j] == groups[i] (int (B,); all equal in Stage 1); in form "marginal" they are
    those rows' chunks, and i's own other chunks.
    """
    if settings.form == "marginal":
        rows = mask.nonzero()[:, 0]
        scores = unit(e_v, mask)[mask] @ unit(e_a, mask)[mask].T
        return info_nce(scores, groups[rows][:, None] == groups[rows][None, :], settings.tau)
    present = mask.any(1)
    candidates = (groups[:, None] == groups[None, :]) & present[:, None] & present[None, :]
    measure = similarity if settings.similarity == "chunk" else global_similarity
    scores = measure(e_v, e_a, mask, mask)
    if settings.form == "margin":
        return margin_loss(scores, candidates, settings.margin)
    return info_nce(scores, candidates, settings.tau, both=settings.form == "bi")


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


WARP = 0.01
"""What a path pays, in cosine, for each imagined chunk that it waits at or skips: it leaves the same index for a reason only."""


def monotone_path(e_v: Tensor, e_a: Tensor) -> Tensor:
    """Which imagined chunk each executed chunk corresponds to, in time order: e_v (m, D), e_a (n, D) -> int64 (n,) in [0, m).

    Dynamic time warping with the asymmetric steps of Sakoe and Chiba (1978), open at the end: p(0) = 0, p(t + 1) - p(t) in
    {0, 1, 2} (wait, go on, skip one), least sum of 1 - cos(e_v[p(t)], e_a[t]) + WARP |p(t + 1) - p(t) - 1|. Both lines start in
    the same frame; where the imagined one ends is not known to be where the executed one does. Of equal paths: the one that
    goes on. Raises ValueError when a line is empty.
    """
    if not len(e_v) or not len(e_a):
        raise ValueError(f"monotone_path: both time lines need a chunk, got {len(e_v)} imagined and {len(e_a)} executed")
    cost = (1.0 - F.normalize(e_a.double(), dim=-1) @ F.normalize(e_v.double(), dim=-1).T).cpu().numpy()
    steps = np.array([1, 0, 2])  # argmin takes the first of equals
    reached: npt.NDArray[np.float64] = np.full(cost.shape[1], np.inf)
    reached[0] = cost[0, 0]
    came = np.zeros(cost.shape, np.int64)
    for t in range(1, len(cost)):
        before = np.stack([np.pad(reached, (s, 0), constant_values=np.inf)[: len(reached)] for s in steps])
        before += WARP * abs(steps - 1)[:, None]
        came[t] = steps[before.argmin(0)]
        reached = before.min(0) + cost[t]
    path = [int(reached.argmin())]
    for t in range(len(cost) - 1, 0, -1):
        path.append(path[-1] - int(came[t, path[-1]]))
    return torch.tensor(path[::-1])
