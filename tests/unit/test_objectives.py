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
    for form in FORMS:
        whole = objectives.contrastive_loss(e_v, e_a, mask, groups, form)
        parts = [objectives.contrastive_loss(e_v[r], e_a[r], mask[r], groups[r], form) for r in (slice(0, 2), slice(2, 4))]
        counts = [int(mask[r].sum()) if form.form == "marginal" else 2 for r in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(whole, (parts[0] * counts[0] + parts[1] * counts[1]) / sum(counts))


def test_a_group_of_one_has_no_contrast():
    e_v, e_a, mask = draw(2, batch=1)
    assert float(objectives.contrastive_loss(e_v, e_a, mask, torch.zeros(1, dtype=torch.long), Contrastive())) == 0.0


FORMS = [
    Contrastive(),
    Contrastive(form="single"),
    Contrastive(form="marginal"),
    Contrastive(form="margin", margin=0.7),
    Contrastive(similarity="global"),
    Contrastive(similarity="global", form="margin"),
]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    extra=st.integers(1, 4),
    junk=st.sampled_from([0.0, 7.0, 1e30, math.nan, math.inf]),
    form=st.sampled_from(FORMS),
)
def test_padded_chunks_change_neither_losses_nor_gradients(seed, extra, junk, form):
    e_v, e_a, mask = draw(seed)
    groups = torch.zeros(len(mask), dtype=torch.long)

    def everything(v, a, m):
        v, a = v.clone().requires_grad_(True), a.clone().requires_grad_(True)
        loss = objectives.contrastive_loss(v, a, m, groups, form) - objectives.positive_cosine(v, a, m)
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


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_that_is_all_padding_takes_no_part(form):
    e_v, e_a, mask = draw(3)
    mask[3] = False
    groups = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(
        objectives.contrastive_loss(e_v, e_a, mask, groups, form),
        objectives.contrastive_loss(e_v[:3], e_a[:3], mask[:3], groups[:3], form),
    )


def test_r2_of_perfect_and_of_constant_predictions():
    true = torch.randn(6, 3, 4, 2)
    mask = torch.ones(6, 3, dtype=torch.bool)
    assert objectives.r2(true, true, mask) == 1.0
    assert objectives.r2(true.mean((0, 1, 2)).expand_as(true), true, mask) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tau": 0.0}, "tau: must be > 0"),
        ({"margin": 0.0}, r"margin: must be in \(0, 2\]"),
        ({"form": "triplet"}, "form: must be one of bi, single, marginal, margin, got 'triplet'"),
        ({"similarity": "mean"}, "similarity: must be one of chunk, global"),
        ({"form": "marginal", "similarity": "global"}, "similarity: form marginal compares single chunks"),
    ],
)
def test_settings_out_of_range_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        Contrastive(**values)


# --- the ablations


def test_global_similarity_forgets_the_order_and_chunk_similarity_does_not():
    e_v, _, _ = draw(4)
    mask = torch.ones(4, 5, dtype=torch.bool)
    reverse = e_v.flip(1)
    torch.testing.assert_close(objectives.global_similarity(e_v, reverse, mask, mask).diagonal(), torch.ones(4))
    assert objectives.similarity(e_v, reverse, mask, mask).diagonal().max() < 0.9
    e_v, e_a, mask = draw(5)
    found = objectives.global_similarity(e_v, e_a, mask, mask)
    for i in range(4):
        for j in range(4):
            expected = torch.cosine_similarity(e_v[i][mask[i]].mean(0), e_a[j][mask[j]].mean(0), dim=0)
            torch.testing.assert_close(found[i, j], expected)


def test_single_is_the_direction_from_video_to_action():
    everyone = torch.ones(2, 2, dtype=torch.bool)
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.5]])
    v_to_a = [-math.log(math.exp(9) / (math.exp(9) + math.exp(1))), -math.log(math.exp(5) / (math.exp(3) + math.exp(5)))]
    single = objectives.info_nce(scores, everyone, 0.1, both=False)
    assert float(single) == pytest.approx(sum(v_to_a) / 2, rel=1e-5)
    symmetric = torch.tensor([[0.9, 0.2], [0.2, 0.5]])
    both = objectives.info_nce(symmetric, everyone, 0.1)
    torch.testing.assert_close(2 * objectives.info_nce(symmetric, everyone, 0.1, both=False), both)
    e_v, e_a, mask = draw(6)
    loss = objectives.contrastive_loss(e_v, e_a, mask, torch.zeros(4, dtype=torch.long), Contrastive(form="single"))
    scores = objectives.similarity(e_v, e_a, mask, mask) / 0.1
    torch.testing.assert_close(loss, -torch.log_softmax(scores, 1).diagonal().mean())


def test_marginal_takes_every_chunk_of_the_group_as_a_sample():
    e_v, e_a, mask = draw(7)
    groups = torch.tensor([0, 1, 0, 1])
    chunks = [(i, t) for i in range(4) for t in range(5) if mask[i, t]]
    expected = []
    for i, t in chunks:
        rivals = [(j, u) for j, u in chunks if groups[j] == groups[i]]
        to_action = torch.stack([torch.cosine_similarity(e_v[i, t], e_a[j, u], dim=0) for j, u in rivals]) / 0.1
        to_video = torch.stack([torch.cosine_similarity(e_v[j, u], e_a[i, t], dim=0) for j, u in rivals]) / 0.1
        own = rivals.index((i, t))
        expected.append(-torch.log_softmax(to_action, 0)[own] - torch.log_softmax(to_video, 0)[own])
    found = objectives.contrastive_loss(e_v, e_a, mask, groups, Contrastive(form="marginal"))
    torch.testing.assert_close(found, torch.stack(expected).mean())
    alone = (e_v[:1], e_a[:1], torch.ones(1, 5, dtype=torch.bool), groups[:1])
    assert objectives.contrastive_loss(*alone, Contrastive()) == 0.0
    assert objectives.contrastive_loss(*alone, Contrastive(form="marginal")) > 0.0, "its own other chunks are negatives"


def test_margin_asks_for_no_more_than_the_margin():
    everyone = torch.ones(2, 2, dtype=torch.bool)
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.5]])
    assert float(objectives.margin_loss(scores, everyone, 0.2)) == 0.0
    # margin .5: row 0 asks nothing of .1 and nothing of .3; row 1 has .5 - .5 + .3 and .5 - .5 + .1
    assert float(objectives.margin_loss(scores, everyone, 0.5)) == pytest.approx((0.0 + 0.3 + 0.1) / 2)


# --- matching in time


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from([0, 1, 2]), max_size=20), seed=st.integers(0, 1000), beyond=st.integers(0, 3))
def test_monotone_path_recovers_a_known_warp(steps, seed, beyond):
    """Execution waits and skips; the imagined line may go on after the execution has ended."""
    path = torch.tensor([0, *steps]).cumsum(0)
    e_v = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))[0][: int(path[-1]) + 1 + beyond]
    e_a = 3.0 * e_v[path] + 0.02 * torch.randn(len(path), 64, generator=torch.Generator().manual_seed(seed))
    assert objectives.monotone_path(e_v, e_a).tolist() == path.tolist()


def test_monotone_path_leaves_the_same_index_for_a_reason_only():
    same = torch.ones(6, 8)
    assert objectives.monotone_path(same, same).tolist() == [0, 1, 2, 3, 4, 5]
    assert objectives.monotone_path(same[:3], same).tolist()[-1] == 2, "beyond the end it stays at the last imagined chunk"
    assert objectives.monotone_path(same, same[:1]).tolist() == [0]
    backwards = torch.eye(4)[[0, 2, 1, 3]]
    found = objectives.monotone_path(torch.eye(4), backwards)
    assert found[0] == 0 and (found.diff() >= 0).all(), "time never runs backwards"
    with pytest.raises(ValueError, match="both time lines need a chunk, got 0 imagined and 6 executed"):
        objectives.monotone_path(same[:0], same)
