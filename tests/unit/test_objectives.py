"""Objectives against their formulas, and the property that padding never matters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from world2act import objectives
from world2act.objectives import Contrastive


def draw(seed: int, batch: int = 4, chunks: int = 5, size: int = 8):
    generator = torch.Generator().manual_seed(seed)
    e_v, e_a = (torch.randn(batch, chunks, size, generator=generator) for _ in range(2))
    lengths = torch.randint(1, chunks + 1, (batch,), generator=generator)
    return e_v, e_a, torch.arange(chunks) < lengths[:, None]


def test_similarity_is_the_masked_mean_of_cosines():
    e_v, e_a, mask = draw(0)
    found = objectives.similarity(e_v, e_a, mask, mask)
    for i in range(4):
        for j in range(4):
            both = [t for t in range(5) if mask[i, t] and mask[j, t]]
            cosines = [torch.cosine_similarity(e_v[i, t], e_a[j, t], dim=0) for t in both]
            torch.testing.assert_close(found[i, j], torch.stack(cosines).mean())


def test_equation_1_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.5]])
    tau = 0.1
    v_to_a = [-math.log(math.exp(9) / (math.exp(9) + math.exp(1))), -math.log(math.exp(5) / (math.exp(3) + math.exp(5)))]
    a_to_v = [-math.log(math.exp(9) / (math.exp(9) + math.exp(3))), -math.log(math.exp(5) / (math.exp(1) + math.exp(5)))]
    expected = (v_to_a[0] + a_to_v[0] + v_to_a[1] + a_to_v[1]) / 2
    everyone = torch.ones(2, 2, dtype=torch.bool)
    assert float(objectives.info_nce(scores, everyone, tau)) == pytest.approx(expected, rel=1e-5)


def test_negatives_come_from_the_same_group_only():
    e_v, e_a, mask = draw(1)
    groups = torch.tensor([0, 0, 1, 1])
    whole = objectives.contrastive_loss(e_v, e_a, mask, groups, Contrastive())
    parts = [objectives.contrastive_loss(e_v[r], e_a[r], mask[r], groups[r], Contrastive()) for r in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_a_group_of_one_has_no_contrast():
    e_v, e_a, mask = draw(2, batch=1)
    assert float(objectives.contrastive_loss(e_v, e_a, mask, torch.zeros(1, dtype=torch.long), Contrastive())) == 0.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 4), junk=st.sampled_from([0.0, 7.0, 1e30, math.nan, math.inf]))
def test_padded_chunks_change_neither_losses_nor_gradients(seed, extra, junk):
    e_v, e_a, mask = draw(seed)
    groups = torch.zeros(len(mask), dtype=torch.long)

    def everything(v, a, m):
        v, a = v.clone().requires_grad_(True), a.clone().requires_grad_(True)
        loss = objectives.contrastive_loss(v, a, m, groups, Contrastive()) - objectives.positive_cosine(v, a, m)
        loss = loss + objectives.decode_loss(v.unflatten(-1, (4, 2)), a.unflatten(-1, (4, 2)), m)
        return loss.detach(), torch.autograd.grad(loss, (v, a))

    loss, gradients = everything(e_v, e_a, mask)
    fill = torch.full((len(mask), extra, e_v.shape[-1]), junk)
    padded_mask = torch.cat([mask, torch.zeros(len(mask), extra, dtype=torch.bool)], 1)
    e_v2, e_a2 = (torch.cat([torch.where(mask[..., None], e, junk), fill], 1) for e in (e_v, e_a))
    padded, padded_gradients = everything(e_v2, e_a2, padded_mask)
    torch.testing.assert_close(padded, loss)
    for found, true in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(found[:, : true.shape[1]], true)
        assert not found[:, true.shape[1] :].any()


def test_a_clip_that_is_all_padding_takes_no_part():
    e_v, e_a, mask = draw(3)
    mask[3] = False
    groups = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(
        objectives.contrastive_loss(e_v, e_a, mask, groups, Contrastive()),
        objectives.contrastive_loss(e_v[:3], e_a[:3], mask[:3], groups[:3], Contrastive()),
    )


def test_r2_of_perfect_and_of_constant_predictions():
    true = torch.randn(6, 3, 4, 2)
    mask = torch.ones(6, 3, dtype=torch.bool)
    assert objectives.r2(true, true, mask) == 1.0
    assert objectives.r2(true.mean((0, 1, 2)).expand_as(true), true, mask) == pytest.approx(0.0, abs=1e-5)


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match="tau: must be > 0"):
        Contrastive(tau=0.0)
