"""Baselines that act in imagination (VLA-RFT, Ctrl-World) and LoRA: toy worlds with known answers, then each from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import naming
from experiments.arena import Policy, Run
from experiments.methods import METHODS, action_worldmodel, cloning, ctrl_world, latent_cloning, lora, named_residual, vla_rft
from experiments.methods.action_worldmodel import Imagined, Transitions
from experiments.methods.base import Frozen, Parts, WithResidual
from experiments.naming import Windows
from world2act import schedule
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.models.vae import VAEConfig, to_float
from world2act.models.worldmodel import WorldModel, WorldModelConfig
from world2act.normalisation import Statistics
from world2act.optimiser import Optimiser
from world2act.presets import STAGE2, Rounds
from world2act.schedule import EpisodeSpec
from world2act.splits import Split
from world2act.stage2 import Learner, Stage2Dataset, Targets
from world2act.types import Episode, M, Trajectory

TINY_MODEL = WorldModelConfig(vae=VAEConfig(widths=(8, 8, 8)), heads=2, head_width=12, layers=1, text_width=8, adaln_width=8)
TINY_BASE = TinyPolicyConfig(channels=(4, 4, 4), hidden=16, text_width=8)
SETTINGS = replace(
    STAGE2["default"],
    plan=Rounds(base=1, perturbed=1, rounds=1, on_policy=1, first_steps=3, steps=2),
    tasks_per_step=2,
    episodes_per_step=2,
)
TASKS = ("push", "reach")
CHUNKS = {"push": 3, "reach": 2}
SHAPE = (4, 4, 8)


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    torch.manual_seed(0)
    return Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), "w" * 64).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> TinyPolicy:
    torch.manual_seed(1)
    return TinyPolicy(TINY_BASE).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    torch.manual_seed(2)
    return WorldModel(TINY_MODEL).eval().requires_grad_(False)


def trajectory(spec: EpisodeSpec, chunks: np.ndarray | None = None, version: int = 0) -> Trajectory:
    rng = np.random.default_rng(spec.index)
    n = CHUNKS[spec.task]
    chunks = rng.uniform(-1, 1, (n, 4, 4)).astype(np.float32) if chunks is None else chunks
    frames = rng.integers(0, 255, (n, 128, 128, 3), dtype=np.uint8)
    states = rng.uniform(0.0, 0.1, (n, 4)).astype(np.float32)
    prompts = (f"{spec.task} it",) * n
    return Trajectory(
        spec.task, "posttrain", spec.index, version, frames, states, chunks, chunks, prompts, f"{spec.task} it", spec.key
    )


# --- the action-conditioned world model


def linear_dynamics(count: int) -> Transitions:
    """A chunk moves each latent channel by its mean action along a fixed direction, and the state by a tenth of it."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn((count, *SHAPE), generator=generator)
    chunks = torch.randn((count, 4, 4), generator=generator)
    pull = chunks.mean(1)
    states = torch.randn((count, 4), generator=generator)
    return Transitions(still, still + pull[:, :, None, None], states, states + 0.1 * pull, chunks)


def test_learns_linear_dynamics_and_uses_the_action() -> None:
    dynamics = action_worldmodel.fit_to(linear_dynamics(400), 0, steps=100)
    found = action_worldmodel.errors(dynamics, linear_dynamics(500).at(torch.arange(400, 500)))
    assert found["latent_error"] < 0.3 * found["copy_error"]
    assert found["other_action_error"] > 1.5 * found["copy_error"], "a wrong chunk must lead elsewhere, further than no motion"
    assert found["state_error"] < 0.3


def test_untrained_dynamics_copy() -> None:
    data = linear_dynamics(8)
    dynamics = action_worldmodel.ActionWorldModel(SHAPE, 4, 4)
    latent, states = dynamics(data.still, data.states, data.chunks)
    assert torch.equal(latent, data.still) and torch.equal(states, data.states)


def test_transitions_pair_a_chunk_with_the_frames_it_leads_to(model: WorldModel, adapters: Adapters) -> None:
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 255, (13, 128, 128, 3), dtype=np.uint8))
    states, actions = torch.arange(13.0)[:, None].repeat(1, 4), torch.rand(12, 4)
    cut = action_worldmodel.cut(model, adapters, frames, states, actions, range(0, 9, 2))
    assert len(cut) == 5 and cut.states[:, 0].tolist() == [0, 2, 4, 6, 8] and cut.after[:, 0].tolist() == [4, 6, 8, 10, 12]
    torch.testing.assert_close(cut.chunks[1], adapters.actions.normalise(actions[2:6]))
    torch.testing.assert_close(cut.still[1].float(), model.encode(frames[None, 2:3])[0, 0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(cut.moving[1].float(), model.encode(frames[None, 2:7])[0, 1], atol=1e-2, rtol=1e-2)


# --- VLA-RFT


@dataclass
class Toy:
    """A world in which a chunk's mean action shows in the first channels of the latent."""

    looked: list[bool] = field(default_factory=list)

    def step(self, still: Tensor, states: Tensor, chunks: Tensor, *, look: bool = True) -> Imagined:
        self.looked.append(look)
        moving = still + chunks.mean(1)[:, :, None, None]
        frames = torch.zeros((len(still), 128, 128, 3), dtype=torch.uint8)
        return Imagined(moving, frames if look else torch.empty(0), still, states)


BETTER = torch.tensor([0.4, 0.0, -0.3, 0.0])
"""What the reference does and the base does not, in standard deviations."""


def toy_starts(horizon: int, count: int = 32) -> vla_rft.Starts:
    latents = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(0))
    reference = (latents + BETTER[:, None, None])[:, None].repeat(1, horizon, 1, 1, 1)
    return vla_rft.Starts(latents, torch.rand(count, 4), torch.zeros(count, 4, 4), reference, ("go",) * count)


def toy_learner(adapters: Adapters) -> Learner:
    return Learner(adapters, replace(SETTINGS, optimiser=Optimiser(rate=5e-3)), 0, latent_shape=SHAPE)


def standing(frames: Tensor, states: Tensor, instructions: Sequence[str]) -> Tensor:
    return torch.zeros(len(frames), 4, 4)


@pytest.mark.parametrize("horizon", [1, 2])
def test_policy_gradient_moves_towards_the_better_action(adapters: Adapters, horizon: int) -> None:
    learner, starts, world = toy_learner(adapters), toy_starts(horizon), Toy()
    settings = vla_rft.Settings(starts=8, group=8, horizon=horizon)
    history = vla_rft.improve(learner, world, standing, starts, 60, settings)
    residual = learner.policy(starts.latents, starts.states, starts.base, starts.instructions).mean((0, 1))
    assert float((residual - BETTER).norm()) < 0.5 * float(BETTER.norm()), residual
    assert history[-1]["reward"] > history[0]["reward"] + 0.02 and learner.version == 1
    assert world.looked[:horizon] == [True] * (horizon - 1) + [False], "the last step of a rollout is not looked at"


def test_kl_keeps_the_policy_at_the_base(adapters: Adapters) -> None:
    learner, starts = toy_learner(adapters), toy_starts(1)
    vla_rft.improve(learner, Toy(), standing, starts, 40, vla_rft.Settings(starts=8, group=8, horizon=1, kl=1e4))
    residual = learner.policy(starts.latents, starts.states, starts.base, starts.instructions)
    assert float(residual.abs().max()) < 0.1


def test_likelihood_is_that_of_the_exploration() -> None:
    settings = vla_rft.Settings(spread=0.3, jitter=0.2)
    drawn = vla_rft.explore(torch.zeros(20_000, 4, 2), settings, torch.Generator().manual_seed(0))
    covariance = 0.2**2 * torch.eye(4) + 0.3**2 * torch.ones(4, 4)
    torch.testing.assert_close(torch.cov(drawn[..., 0].T), covariance, atol=5e-3, rtol=0)
    expected = torch.einsum("nma,mk,nka->n", drawn[:9], torch.linalg.inv(covariance), drawn[:9])
    torch.testing.assert_close(vla_rft.quadratic(drawn[:9], settings), expected, atol=1e-3, rtol=1e-4)


def test_advantages_compare_what_follows_with_the_group_alone() -> None:
    rewards = torch.tensor([[1.0, 0.0, 50.0, 50.0], [3.0, 3.0, 7.0, 5.0]])
    found = vla_rft.advantages(rewards, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 1.0, -1.0]]))


# --- Ctrl-World


def test_the_closest_rollouts_of_each_scene_are_kept() -> None:
    distance = torch.tensor([[3.0, 1.0, 2.0, 9.0], [0.1, 0.4, 0.2, 0.3]])
    assert ctrl_world.best(distance, 1).tolist() == [1, 4] and ctrl_world.best(distance, 2).tolist() == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="kept: must be between 1 and 4"):
        ctrl_world.best(distance, 5)


def test_samples_are_of_the_kept_rollouts_and_end_with_their_scene() -> None:
    scenes = [trajectory(EpisodeSpec(0, task, 0, 0.0, "0")) for task in ("reach", "push")]  # 2 and 3 chunks
    rows = 2 * ctrl_world.ROLLOUTS
    distance = torch.ones(rows, 3)
    distance[2, :2], distance[3, 2], distance[5] = 0.5, -90.0, 0.9  # row 3 is best only beyond the end of its scene
    states = torch.arange(rows)[:, None, None].expand(rows, 3, 4).float()
    rollouts = ctrl_world.Rollouts(torch.zeros((rows, 3, 64, 128, 3), dtype=torch.uint8), states, states[:, :, None], distance)
    samples, mean = ctrl_world.selected(rollouts, scenes)
    assert samples.states[:, 0].tolist() == [2, 2, 5, 5, 5] and mean.shape == (2, ctrl_world.ROLLOUTS)
    assert samples.instructions == ["reach it"] * 2 + ["push it"] * 3


def test_offsets_leave_the_first_rollout_and_the_gripper_alone() -> None:
    found = ctrl_world.offsets(2 * ctrl_world.ROLLOUTS, 6, 4, torch.Generator().manual_seed(0))
    assert found.shape == (2 * ctrl_world.ROLLOUTS, 6, 1, 4)
    assert not found[:: ctrl_world.ROLLOUTS].any() and not found[..., 3].any()
    moved = found[1 : ctrl_world.ROLLOUTS, :, 0, :3]
    assert torch.equal(moved[:, 0], moved[:, ctrl_world.HOLD - 1]) and not torch.equal(moved[:, 0], moved[:, ctrl_world.HOLD])


# --- LoRA


def test_lora_starts_as_the_base(base: TinyPolicy, adapters: Adapters) -> None:
    policy = lora.LoraPolicy(base, adapters, 16, 0.5, 0).eval()
    spec = EpisodeSpec(0, "push", 0, 0.0, "0")
    found = trajectory(spec)
    frames, states = torch.from_numpy(found.frames), torch.from_numpy(found.states)
    chunk, combined = lora.WithLora(base, policy, 0).act(frames, states, ["push it"] * 3, ["push it"] * 3)
    assert torch.equal(chunk, base.act(frames, states, ["push it"] * 3)) and torch.equal(chunk, combined)


def test_an_action_beyond_the_limit_is_seen_by_the_loss(base: TinyPolicy, adapters: Adapters) -> None:
    """Where it is clipped in value but not in gradient, nothing ever stops it: training falls apart after a few hundred steps."""
    policy = lora.LoraPolicy(base, adapters, 16, 4.0, 0).eval()
    policy.net.action_mean.fill_(1.5)
    policy.net.action_std.zero_()
    frames, states, words = seen(EpisodeSpec(0, "push", 0, 0.0, "0"))
    active = to_float(frames[:, : base.config.active_rows]).permute(0, 3, 1, 2)
    limit = adapters.actions.normalise(torch.ones(len(frames), M, 4))
    beyond = adapters.actions.normalise(torch.full((len(frames), M, 4), 1.5)) - limit
    assert torch.allclose(policy(active, states, limit, words), 4.0 * torch.tanh(beyond / 4.0)) and (beyond > 0).all()


@pytest.mark.parametrize("rank", [16, 32])
def test_lora_trains_only_low_rank_factors_towards_the_target(base: TinyPolicy, adapters: Adapters, rank: int) -> None:
    settings = replace(SETTINGS, optimiser=Optimiser(rate=5e-3), decode_weight=1.0, cosine_weight=0.0)
    learner = lora.LoraLearner(base, adapters, settings, 0, rank)
    data = Stage2Dataset(adapters, learner.settings)
    for spec in schedule.plan(settings, TASKS, 0):
        found = trajectory(spec, base.act(*seen(spec)).numpy())
        n = len(found.frames)
        chunks = adapters.actions.normalise(torch.from_numpy(found.base)) + 0.3
        data.add(spec, found, Targets(torch.ones(n, 32), torch.ones(n, dtype=torch.bool), None, chunks))
    before = {name: value.clone() for name, value in learner.policy.state_dict().items() if not name.startswith("state_")}
    history = learner.train_round(data, 40)
    assert history[-1]["decode"] < 0.5 * history[0]["decode"]
    changed = {name for name, value in before.items() if not torch.equal(value, learner.policy.state_dict()[name])}
    assert changed and all(".down." in name or ".up." in name for name in changed), changed
    shapes = [tuple(value.shape) for name, value in before.items() if ".down." in name]
    assert len(shapes) == 7 and all(shape[0] == rank for shape in shapes), "3 convolutions and 4 linear layers"


def test_lora_learns_the_same_on_a_gpu(base: TinyPolicy, adapters: Adapters) -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: LoRA on one is not tested here")
    losses = {}
    for device in ("cpu", "cuda"):
        learner = lora.LoraLearner(base, adapters, SETTINGS, 0, 16, device)
        data = Stage2Dataset(adapters, learner.settings)
        for spec in schedule.plan(SETTINGS, TASKS, 0):
            n = len(seen(spec)[0])
            data.add(spec, trajectory(spec), Targets(torch.ones(n, 32), torch.ones(n, dtype=torch.bool)))
        losses[device] = [metrics["loss"] for metrics in learner.train_round(data, 6)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2)


def seen(spec: EpisodeSpec) -> tuple[Tensor, Tensor, list[str]]:
    found = trajectory(spec)
    return torch.from_numpy(found.frames), torch.from_numpy(found.states), [found.instruction] * len(found.frames)


# --- named video


def test_named_video_has_the_actions_that_are_read_from_it(model: WorldModel, adapters: Adapters) -> None:
    """Chunk by chunk as the windows that the reader was fitted to; what was recorded does not matter."""
    episode = demonstrations()[0]

    def longer(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, rows[-1:]])

    images = {name: longer(frames) for name, frames in episode.images.items()}
    states, widths, actions = longer(episode.states), longer(episode.widths), longer(episode.actions)
    whole = replace(episode, images=images, states=states, widths=widths, actions=actions)
    network = naming.InverseDynamics(model.config.vae.latent_shape, adapters.actions).eval().requires_grad_(False)
    found = naming.named(model, network, whole)
    shown = naming.windows(model, [naming.film_of(episode)], stride=M)
    expected = network.read(shown.latents[None].float())[0].clamp(-1, 1).flatten(0, 1)
    assert len(found.actions) == 8 == len(found.states) - 1 == len(found.images["primary"]) - 1, "whole chunks only"
    np.testing.assert_allclose(found.actions, expected, atol=5e-3)  # windows keep half precision
    again = naming.named(model, network, replace(whole, actions=np.zeros_like(actions)))
    np.testing.assert_array_equal(again.actions, found.actions)


def test_a_residual_on_named_video_aims_at_the_named_actions_and_leaves_out_what_was_disturbed(parts: Parts) -> None:
    for number, episode in enumerate(e for e in parts.named() if len(e.actions) > M):
        wanted = np.ones(len(episode.actions), dtype=bool)
        wanted[M] = number == 0
        at, targets = named_residual._shown(parts, replace(episode, intended=wanted))
        assert targets.mask.tolist() == [True, number == 0, *[True] * (len(at.frames) - 2)]
        assert targets.chunks is not None
        done = parts.adapters.actions.denormalise(targets.chunks).flatten(0, 1)
        np.testing.assert_allclose(done, episode.actions[: len(done)], atol=1e-5)
        np.testing.assert_array_equal(at.states, episode.states[: len(at.frames) * M : M])
        expected = parts.base.act(*(torch.from_numpy(x) for x in (at.frames, at.states)), [episode.instruction] * len(at.frames))
        np.testing.assert_array_equal(at.base, expected)
        assert torch.allclose(targets.embeddings, parts.adapters.action(targets.chunks[None])[0])
    policy = METHODS["named-residual"](parts)
    assert isinstance(policy, WithResidual) and policy.base is parts.base


def test_cloning_without_proprioception_neither_learns_from_it_nor_acts_on_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Episode] = []
    monkeypatch.setattr(cloning, "clone", lambda episodes, seed: seen.extend(episodes) or parts.base)
    policy = METHODS["named-cloning-blind"](parts)
    assert len(seen) == 8 and not any(episode.states.any() for episode in seen)
    frames = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    here, there = (policy.act(frames, torch.full((1, 4), place), ["push"], ["push"])[1] for place in (0.0, 0.5))
    assert torch.equal(here, there) and torch.equal(here, parts.base.act(frames, torch.zeros(1, 4), ["push"]))


def test_the_imitator_of_latents_sees_latent_and_prompt_alone(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cloning, "STEPS", 3)
    episode = next(iter(parts.named()))
    wanted = np.ones(len(episode.actions), dtype=bool)
    wanted[5] = False
    latents, chunks, prompts = latent_cloning._shown(parts, replace(episode, intended=wanted))
    starts = [t for t in range(0, len(episode.actions) - M + 1, 2) if not t <= 5 < t + M]
    assert len(latents) == len(chunks) == len(prompts) <= len(starts) and set(prompts) and latents.dtype == torch.float16
    policy = METHODS["latent-cloning"](parts)
    frames = torch.randint(256, (1, 128, 128, 3), dtype=torch.uint8)
    cases = ((0.0, "grasp"), (1.0, "grasp"), (0.0, "lift"))
    asked = [policy.act(frames, torch.full((1, 4), place), ["push"], [said])[1] for place, said in cases]
    assert torch.equal(asked[0], asked[1]) and not torch.equal(asked[0], asked[2]) and asked[0].abs().max() <= 1.0


# --- end to end


@dataclass
class FakeArena:
    """Random pictures instead of a simulator; remembers what it executed."""

    spread: np.ndarray
    segmented: bool = True
    executed: list[tuple[str, int, int]] = field(default_factory=list)
    spec: Any = field(default_factory=lambda: SimpleNamespace(gripper_width_index=3, gripper_open_width=0.09))
    simulator: str = "metaworld"

    def run(
        self, specs: Sequence[EpisodeSpec], policy: Policy, split: Split = Split.POSTTRAIN, *, film: bool = False, **_: bool
    ) -> list[Run]:
        runs = []
        for spec in specs:
            frames, states, instructions = seen(spec)
            base, combined = policy.act(frames, states, instructions, instructions)
            found = replace(trajectory(spec, base.numpy(), policy.version), executed=combined.numpy())
            self.executed.append((spec.task, spec.index, policy.version))
            extra = np.repeat(found.frames, 4, 0)
            runs.append(Run(found, False, np.concatenate([extra, extra[:1]]) if film else None))
        return runs


def demonstrations() -> list[Episode]:
    rng = np.random.default_rng(0)

    def one(task: str, index: int) -> Episode:
        images = {name: rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8) for name in ("primary", "wrist")}
        states, actions = rng.uniform(0, 0.1, (9, 4)).astype(np.float32), rng.uniform(-1, 1, (8, 4)).astype(np.float32)
        return Episode(task, "base", index, f"{task} it", images, states, states[:, 3], actions, True)

    return [one(task, index) for task in TASKS for index in range(2)]


@pytest.fixture
def parts(base: TinyPolicy, model: WorldModel, adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(action_worldmodel, "STEPS", 2)
    monkeypatch.setattr(action_worldmodel, "PLAY_EPISODES", 1)
    monkeypatch.setattr(ctrl_world, "cloning_steps", lambda episodes: 2)
    monkeypatch.setattr(vla_rft.train, "__defaults__", (vla_rft.Settings(starts=2, group=3, horizon=2),))
    arena: Any = FakeArena(np.full(4, 0.5, np.float32))
    shown = Windows(torch.randn(20, *model.config.vae.latent_shape).half(), torch.rand(20, 4, 4) * 2 - 1)
    inverse = naming.fit([(shown, 1.0)], 0.3, 0, adapters.actions, steps=2)
    named = [naming.named(model, inverse, replace(episode, split="worldmodel")) for episode in demonstrations()]
    return Parts(base, model, adapters, demonstrations, lambda: inverse, lambda: named, lambda: base, TASKS, SETTINGS, 0, arena)


@pytest.mark.parametrize(
    "name", ["world2act", "world2act-film", "inverse-dynamics", "vla-rft", "ctrl-world", "lora-16", "lora-32"]
)
def test_a_method_runs_from_end_to_end_on_the_plans_scenes(parts: Parts, name: str) -> None:
    notes: dict[str, float] = {}
    rounds: list[int] = []
    parts.note, parts.on_round = notes.__setitem__, lambda number, policy: rounds.append(number)
    weights = {key: value.clone() for key, value in parts.base.state_dict().items()}
    policy = METHODS[name](parts)
    arena: Any = parts.arena
    planned = [(spec.task, spec.index) for spec in schedule.plan(SETTINGS, TASKS, 0)]
    own = [entry for entry in arena.executed if entry[1] < schedule.INDICES_PER_SEED]
    assert sorted(entry[:2] for entry in own) == sorted(planned), "the same scenes as ours, each once"
    assert all(torch.equal(value, parts.base.state_dict()[key]) for key, value in weights.items()), "a method trains a copy"
    assert all(np.isfinite(value) for value in notes.values()) and "seconds/train" in notes
    frames, states, instructions = seen(EpisodeSpec(0, "push", 77, 0.0, "0"))
    chunk, combined = policy.act(frames, states, instructions, instructions)
    expected = parts.base.act(frames, states, instructions)
    assert not torch.equal(combined, expected) and float(combined.abs().max()) <= 1.0
    if name == "ctrl-world":
        assert isinstance(policy, Frozen) and notes["rollouts"] == ctrl_world.ROLLOUTS * len(planned)
        assert notes["distance/kept"] < notes["distance/all"]
        return
    assert rounds == [0, 1] and torch.equal(chunk, expected)
    assert {version for _, index, version in own} == {0, 1}, "round 1 is executed with the policy of round 0"
    assert isinstance(policy, lora.WithLora if name.startswith("lora") else WithResidual) and policy.version == 2
    if name.startswith("world2act"):
        shown = len([*parts.labels(), *parts.named()]) if name == "world2act-film" else 0
        assert isinstance(policy, WithResidual) and policy.bundle.card["episodes"] == len(planned) + shown
