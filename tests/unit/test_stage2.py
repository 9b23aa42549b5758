"""Stage 2: the plan, what a data set accepts, determinism to the bit, resuming, staleness, and that it learns."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from world2act import objectives, schedule, stage2
from world2act.models import store
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics
from world2act.presets import STAGE2, Rounds
from world2act.splits import LeakageError
from world2act.types import Trajectory

SETTINGS = replace(
    STAGE2["default"],
    plan=Rounds(base=2, perturbed=1, rounds=1, on_policy=2, first_steps=6, steps=4),
    tasks_per_step=2,
    episodes_per_step=2,
    contrastive_weight=0.1,
)
TASKS = ("reach", "push")


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    torch.manual_seed(0)
    statistics = Statistics(torch.tensor([0.1, 0.0, 0.0, 0.2]), torch.tensor([0.5, 1.0, 1.0, 2.0]))
    return Adapters(AdapterSettings(), statistics, "w" * 64).eval().requires_grad_(False)


def trajectory(spec: schedule.EpisodeSpec, version: int = 0, split: str = "posttrain") -> Trajectory:
    rng = np.random.default_rng(spec.index)
    n = 2 + spec.index % 3
    base = rng.uniform(-1, 1, (n, 4, 4)).astype(np.float32)
    frames, states = np.zeros((n, 128, 128, 3), np.uint8), rng.normal(size=(n, 4)).astype(np.float32)
    return Trajectory(spec.task, split, spec.index, version, frames, states, base, base, ("go",) * n, f"{spec.task} it", spec.key)


def targets(found: Trajectory) -> stage2.Targets:
    generator = torch.Generator().manual_seed(found.index)
    n = len(found.frames)
    embeddings = torch.randn(n, 32, generator=generator)
    return stage2.Targets(embeddings, torch.ones(n, dtype=torch.bool), torch.randn(n, 16, 8, 16, generator=generator))


def dataset(adapters, specs, settings=SETTINGS) -> stage2.Stage2Dataset:
    data = stage2.Stage2Dataset(adapters, settings)
    for spec in specs:
        data.add(spec, trajectory(spec), targets(trajectory(spec)))
    return data


def bits(learner: stage2.Learner) -> bytes:
    return learner.bundle("b" * 64).to_bytes()


# --- plan


def test_plan_is_a_function_of_its_seed_and_repeats_no_scene():
    specs = schedule.plan(SETTINGS, TASKS, 0)
    assert specs == schedule.plan(SETTINGS, TASKS[::-1], 0)
    assert len(specs) == 2 * (3 + 2) and [len(members) for _, members in schedule.rounds(specs)] == [6, 4]
    other = schedule.plan(SETTINGS, TASKS, 1)
    scenes = {(s.task, s.index) for s in [*specs, *other]}
    assert len(scenes) == len(specs) + len(other) == len({s.key for s in [*specs, *other]})
    with pytest.raises(ValueError, match="seed: 100 is outside"):
        schedule.plan(SETTINGS, TASKS, 100)


def test_perturbation_moves_the_arm_only_and_repeats():
    spec = next(s for s in schedule.plan(SETTINGS, TASKS, 0) if s.noise > 0)
    std = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    offsets = schedule.perturbation(spec, 500, std)
    np.testing.assert_array_equal(offsets, schedule.perturbation(spec, 500, std))
    np.testing.assert_allclose(offsets[:, :3].std(0), spec.noise * std[:3], rtol=0.15)
    assert not offsets[:, 3:].any()
    assert not schedule.perturbation(replace(spec, noise=0.0), 5, std).any()


def test_staleness_bound():
    synchronous, bounded = schedule.StalenessManager(0), schedule.StalenessManager(1)
    assert synchronous.may_start(0, 0) and not synchronous.may_start(1, 0) and synchronous.may_start(1, 1)
    assert bounded.may_start(1, 0) and not bounded.may_start(2, 0)
    assert [bounded.accept(*pair) for pair in ((1, 0), (1, 1), (2, 0), (0, 1))] == [True, True, False, True]
    assert bounded.accepted == {1: 1, 0: 1, -1: 1} and bounded.rejected == {2: 1}
    with pytest.raises(ValueError, match="eta: must be >= 0"):
        schedule.StalenessManager(-1)


# --- data


def test_data_of_another_split_or_scene_is_refused(adapters):
    first, second = schedule.plan(SETTINGS, TASKS, 0)[:2]
    data = stage2.Stage2Dataset(adapters, SETTINGS)
    for split in ("evaluation", "tuning", "worldmodel"):
        with pytest.raises(LeakageError, match=f"stage 2: takes episodes of split posttrain only, got {split}"):
            data.add(first, trajectory(first, split=split), targets(trajectory(first)))
    with pytest.raises(ValueError, match="the plan asks"):
        data.add(first, trajectory(second), targets(trajectory(second)))
    with pytest.raises(ValueError, match="targets: must be"):
        short = targets(trajectory(first))
        data.add(first, trajectory(first), replace(short, embeddings=short.embeddings[1:]))
    with pytest.raises(ValueError, match="states: must be"):
        broken = replace(trajectory(first), states=np.full_like(trajectory(first).states, np.nan))
        data.add(first, broken, targets(broken))
    assert len(data) == 0


def test_an_episode_counts_once(adapters):
    specs = schedule.plan(SETTINGS, TASKS, 0)[:3]
    data = dataset(adapters, [*specs, *specs])
    assert len(data) == 3 and data.keys == {s.key for s in specs}
    assert not data.add(specs[0], trajectory(specs[0]), targets(trajectory(specs[0])))


def test_frames_are_encoded_when_targets_bring_no_latents(adapters):
    spec = schedule.plan(SETTINGS, TASKS, 0)[0]
    bare = replace(targets(trajectory(spec)), visual=None)
    with pytest.raises(ValueError, match="no encoder was given"):
        stage2.Stage2Dataset(adapters, SETTINGS).add(spec, trajectory(spec), bare)
    data = stage2.Stage2Dataset(adapters, SETTINGS, encode=lambda frames: torch.ones(len(frames), 1, 16, 8, 16))
    data.add(spec, trajectory(spec), bare)
    assert data.stack()[0].visual.shape[2:] == (16, 8, 16) and data.stack()[0].visual.eq(1).all()


# --- learner


def test_order_of_arrival_does_not_matter_and_the_seed_does(adapters):
    specs = schedule.plan(SETTINGS, TASKS, 0)
    results = []
    for arrived, seed in ((specs, 0), (specs[::-1], 0), (specs, 1)):
        learner = stage2.Learner(adapters, SETTINGS, seed)
        learner.train_round(dataset(adapters, arrived), 6)
        results.append(bits(learner))
    assert results[0] == results[1] != results[2]


def test_serial_driver_equals_its_steps_to_the_bit(adapters):
    """`post_train` on live callables against the learner fed with the recorded data, as the distributed trainer does."""
    specs = schedule.plan(SETTINGS, TASKS, 0)
    serial, data = stage2.Learner(adapters, SETTINGS, 0), stage2.Stage2Dataset(adapters, SETTINGS)
    history = stage2.post_train(specs, lambda members, _: map(trajectory, members), targets, serial, data)
    assert [len(h) for h in history] == [6, 4] and serial.version == 2 and serial.consumed == {s.key for s in specs}

    fed, recorded = stage2.Learner(adapters, SETTINGS, 0), stage2.Stage2Dataset(adapters, SETTINGS)
    for number, members in schedule.rounds(specs):
        for spec in reversed(members):
            recorded.add(spec, trajectory(spec), targets(trajectory(spec)))
        fed.train_round(recorded, schedule.steps_of(number, SETTINGS))
    assert bits(fed) == bits(serial)


def test_a_residual_says_which_instructions_it_knows_where_each_task_has_one(adapters, tmp_path):
    specs = schedule.plan(SETTINGS, TASKS, 0)
    data, learner = dataset(adapters, specs), stage2.Learner(adapters, SETTINGS, 0)
    assert learner.bundle("b" * 64).knows("anything"), "untrained"
    learner.train_round(data, 1)
    learner.checkpoint(tmp_path / "c.safetensors")
    resumed = stage2.Learner(adapters, SETTINGS, 0)
    resumed.resume(tmp_path / "c.safetensors")
    for bundle in (learner.bundle("b" * 64), resumed.bundle("b" * 64)):
        assert bundle.instructions == ("push it", "reach it") and bundle.knows("Push it!") and not bundle.knows("push")
    also = schedule.EpisodeSpec(0, "push", 10**6, 0.0, "another")
    data.add(also, replace(trajectory(also), instruction="push that"), targets(trajectory(also)))
    learner.train_round(data, 1)
    assert learner.bundle("b" * 64).knows("anything"), "a task with two instructions may have a third"


def test_resume_in_the_middle_of_a_round_is_exact(adapters, tmp_path):
    data = dataset(adapters, schedule.plan(SETTINGS, TASKS, 0))
    whole = stage2.Learner(adapters, SETTINGS, 0)
    expected = whole.train_round(data, 6) + whole.train_round(data, 4)

    class KilledError(Exception):
        pass

    first, seen = stage2.Learner(adapters, SETTINGS, 0), []

    def stop_after_four(metrics):
        seen.append(metrics)
        if len(seen) == 4:
            first.checkpoint(tmp_path / "c.safetensors")
            raise KilledError

    with pytest.raises(KilledError):
        first.train_round(data, 6, stop_after_four)
    second = stage2.Learner(adapters, SETTINGS, 77)
    second.resume(tmp_path / "c.safetensors")
    assert seen + second.train_round(data, 6) + second.train_round(data, 4) == expected
    assert bits(second) == bits(whole) and second.consumed == whole.consumed and second.version == 2


def test_a_gpu_learns_the_same_and_what_it_began_goes_on_without_one(adapters, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: Stage 2 on one is not tested here")
    data = dataset(adapters, schedule.plan(SETTINGS, TASKS, 0))
    cpu, gpu, again = (stage2.Learner(adapters, SETTINGS, 0, device=device) for device in ("cpu", "cuda", "cuda"))
    losses = [[m["loss"] for m in learner.train_round(data, 6)] for learner in (cpu, gpu, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and bits(gpu) == bits(again)
    gpu.checkpoint(tmp_path / "c.safetensors")
    for device in ("cuda", "cpu"):
        resumed = stage2.Learner(adapters, SETTINGS, 77, device=device)
        resumed.resume(tmp_path / "c.safetensors")
        expected = copy.deepcopy(gpu).train_round(data, 4)[-1]["loss"]
        assert resumed.train_round(data, 4)[-1]["loss"] == pytest.approx(expected, rel=1e-2)
        assert next(resumed.bundle("0" * 64).policy.parameters()).device.type == "cpu"


def test_a_gpu_that_is_not_there_is_named(adapters, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stage2.Learner(adapters, SETTINGS, 0, device="auto").device.type == "cpu"
    with pytest.raises(ValueError, match="device: cuda"):
        stage2.Learner(adapters, SETTINGS, 0, device="cuda")


def test_resume_refuses_other_settings_and_adapters(adapters, tmp_path):
    stage2.Learner(adapters, SETTINGS, 0).checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(store.WeightsError, match="made with other settings"):
        stage2.Learner(adapters, replace(SETTINGS, latent_noise=0.2), 0).resume(tmp_path / "c.safetensors")
    other = Adapters(AdapterSettings(), adapters.actions, "v" * 64)
    with pytest.raises(store.WeightsError, match="made with other adapters"):
        stage2.Learner(other, SETTINGS, 0).resume(tmp_path / "c.safetensors")


DECODE = {"decode_weight": 1.0, "cosine_weight": 0.0}


@pytest.mark.parametrize(
    ("preset", "weights", "term"), [("default", {}, "cosine"), ("default", DECODE, "decode"), ("paper", {}, "contrastive")]
)
def test_learns_targets_that_the_observation_determines(adapters, preset, weights, term):
    """e_v = E_a(base + a shift within the bound). Only its own loss must fall: InfoNCE alone can lower the cosine."""
    settings = replace(STAGE2[preset], vision="latent", tasks_per_step=2, episodes_per_step=4, **weights)
    settings = replace(settings, optimiser=replace(settings.optimiser, rate=2e-3), latent_noise=0.0, state_noise=0.0)
    plan = replace(settings, plan=Rounds(base=8, perturbed=0, rounds=0, first_steps=60))
    data = stage2.Stage2Dataset(adapters, settings)
    for spec in schedule.plan(plan, TASKS, 0):
        found = trajectory(spec)
        shift = 0.8 * torch.tanh(torch.from_numpy(found.states[:, :1]))[:, :, None]
        wanted = adapters.actions.normalise(torch.from_numpy(found.base)) + shift
        visual = torch.zeros(len(found.frames), 16, 8, 16)
        data.add(spec, found, stage2.Targets(adapters.action(wanted), torch.ones(len(visual), dtype=torch.bool), visual))
    history = stage2.Learner(adapters, settings, 0).train_round(data, 60)
    assert history[0]["residual_norm"] == 0.0 and 0 < history[-1]["residual_norm"] <= settings.bound
    assert history[-1][term] < 0.9 * history[0][term]


def test_masked_chunks_take_no_part(adapters):
    quiet = replace(SETTINGS, latent_noise=0.0, state_noise=0.0)
    learner = stage2.Learner(adapters, quiet, 0)
    batch = dataset(adapters, schedule.plan(SETTINGS, TASKS, 0), quiet).draw(torch.Generator().manual_seed(0))
    clean = learner.losses(batch)
    spoiled = replace(batch, target=torch.where(batch.mask[..., None], batch.target, 1e9))
    spoiled = replace(spoiled, base=torch.where(batch.mask[..., None, None], batch.base, 1e9))
    for name, value in learner.losses(spoiled).items():
        torch.testing.assert_close(value, clean[name])


# --- targets


class BrightnessModel:
    """Imagines brightness + 1 per latent; decoding gives that brightness back."""

    hash = "w" * 64

    def encode(self, frames):
        return frames[:, ::4].float().mean((2, 3, 4))[..., None, None, None].expand(-1, -1, 16, 4, 4)

    def decode(self, latents):
        value = latents.mean((2, 3, 4)).to(torch.uint8)
        return value[:, :, None, None, None].expand(-1, -1, 4, 4, 3)

    def imagine(self, start, prompts, horizon, seeds):
        ahead = torch.arange(1.0 + horizon)
        return (start.float().mean((1, 2, 3))[:, None] + ahead)[..., None, None, None].expand(-1, -1, 16, 4, 4)


def seen_by_adapter(adapters, monkeypatch) -> list[float]:
    values: list[float] = []
    real = adapters.video.forward
    monkeypatch.setattr(adapters.video, "forward", lambda x: values.extend(x.mean((2, 3, 4)).flatten().tolist()) or real(x))
    return values


def test_targets_pair_each_chunk_with_the_latent_that_shows_its_result(adapters, monkeypatch):
    spec = schedule.plan(SETTINGS, TASKS, 0)[0]
    frames = np.broadcast_to(np.array([10, 20, 30, 40], np.uint8)[:, None, None, None], (4, 4, 4, 3)).copy()
    found = replace(trajectory(spec), frames=frames, prompts=("pick", "pick", "place", "place"))
    values = seen_by_adapter(adapters, monkeypatch)
    closed = stage2.closed_loop_targets(BrightnessModel(), adapters, found)
    assert values == [11, 21, 31, 41]
    assert closed.visual[:, 0, 0, 0].tolist() == [10, 20, 30, 40] and closed.embeddings.shape == (4, 32)

    values.clear()
    stage2.open_loop_targets(BrightnessModel(), adapters, found)
    assert values == [11, 12, 13, 14], "the second skill starts from the first clip's last frame"


class NamingModel:
    """Latents that say which frame (100 x its brightness) and how far ahead (k) they are; remembers what it was asked."""

    hash = "w" * 64

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[str], list[int]]] = []

    def imagine(self, start, prompts, horizon, seeds):
        self.asked.append((horizon, list(prompts), list(seeds)))
        values = 100 * start.float().mean((1, 2, 3))[:, None] + torch.arange(1.0 + horizon)
        return values[..., None, None, None].expand(-1, -1, 16, 4, 4)


def test_clips_of_n_chunks_start_at_every_nth_frame_and_latent_k_pairs_with_the_kth_chunk(adapters):
    spec, model = schedule.plan(SETTINGS, TASKS, 0)[0], NamingModel()
    frames = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 4, 4, 3)).copy()
    found = replace(trajectory(spec), frames=frames, prompts=tuple("aabbbcc"))
    made = stage2.imagined_targets(model, adapters, replace(SETTINGS, closed_loop_every=3), found, seed=40)
    assert model.asked == [(3, ["a", "b", "c"], [40, 43, 46])], "the skill active where the clip starts"
    wanted = torch.tensor([1.0, 2, 3, 301, 302, 303, 601])[:, None, None, None, None].expand(-1, 1, 16, 4, 4)
    torch.testing.assert_close(made.embeddings, adapters.video(wanted)[:, 0])
    assert made.mask.shape == (7,) and made.mask.all() and made.visual is None
    every_frame = stage2.imagined_targets(model, adapters, SETTINGS, found)
    torch.testing.assert_close(every_frame.visual[:, 0, 0, 0], 100 * torch.arange(7.0))


def test_alignment_gives_each_executed_chunk_its_imagined_one_skill_by_skill(adapters, monkeypatch):
    """The imagined line is the embeddings of eight known chunks; the execution waits once and skips once, in each skill."""
    spec = schedule.plan(SETTINGS, TASKS, 0)[0]
    chunks = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0))
    warp = [0, 0, 1, 3, 4, 6, 6, 7]
    executed = adapters.actions.denormalise(chunks[warp]).numpy()
    found = replace(trajectory(spec), executed=executed, prompts=("pick",) * 4 + ("place",) * 4)
    imagined = stage2.Targets(adapters.action(chunks[None])[0], torch.ones(8, dtype=torch.bool))
    monkeypatch.setattr(stage2, "open_loop_targets", lambda *_: imagined)
    settings = replace(SETTINGS, target="open-loop", alignment="monotone")
    made = stage2.imagined_targets(BrightnessModel(), adapters, settings, found)
    assert torch.equal(made.embeddings, imagined.embeddings[warp])
    same = stage2.imagined_targets(BrightnessModel(), adapters, replace(settings, alignment="same-index"), found)
    assert torch.equal(same.embeddings, imagined.embeddings)


# --- the objective


def test_terms_compose_with_their_weights_and_the_default_is_the_cosine_alone(adapters):
    quiet = replace(STAGE2["default"], latent_noise=0.0, state_noise=0.0)
    data = dataset(adapters, schedule.plan(SETTINGS, TASKS, 0), quiet)
    batch = data.draw(torch.Generator().manual_seed(0))
    named = {"decode", "contrastive", "cosine", "penalty"}

    def losses(settings):
        learner = stage2.Learner(adapters, settings, 0)
        torch.nn.init.normal_(learner.policy.head[-1].weight, generator=torch.Generator().manual_seed(1))
        return learner.losses(batch)

    default = losses(quiet)
    assert torch.equal(default["loss"], default["cosine"]) and torch.equal(default["loss"], 1 - default["positive_cosine"])
    decode = losses(replace(quiet, **DECODE))
    assert named & decode.keys() == {"decode"} and torch.equal(decode["loss"], decode["decode"])
    every = replace(quiet, decode_weight=1.0, contrastive_weight=0.1, cosine_weight=0.7, residual_penalty=3.0)
    found = losses(every)
    assert named <= found.keys()
    expected = found["decode"] + 0.1 * found["contrastive"] + 0.7 * (1 - found["positive_cosine"])
    torch.testing.assert_close(found["loss"], expected + 3.0 * found["residual_norm"] ** 2)
    single = losses(replace(every, contrastive=objectives.Contrastive(form="single")))
    assert 0 < single["contrastive"] < found["contrastive"]


def test_the_penalty_shrinks_the_residual_and_cosine_alone_raises_the_cosine(adapters):
    specs = schedule.plan(SETTINGS, TASKS, 0)

    def end_of(**changes):
        settings = replace(STAGE2["default"], latent_noise=0.0, state_noise=0.0, **changes)
        history = stage2.Learner(adapters, settings, 0).train_round(dataset(adapters, specs, settings), 40)
        return history[0], history[-1]

    free, held = end_of()[1], end_of(residual_penalty=10.0)[1]
    assert held["residual_norm"] < 0.5 * free["residual_norm"]
    first, last = end_of()
    assert last["positive_cosine"] > first["positive_cosine"] + 0.02


@pytest.mark.parametrize("on_policy", [0, 1])
def test_a_plan_too_large_is_refused_before_it_is_made(on_policy):
    endless = replace(SETTINGS, plan=replace(SETTINGS.plan, rounds=10**12, on_policy=on_policy))
    with pytest.raises(ValueError, match="over 10000 episodes a task"):
        schedule.plan(endless, ["reach"], 0)
