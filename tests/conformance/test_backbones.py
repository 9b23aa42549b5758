"""World-model backbones: the contract that all satisfy, equality with diffusers' own pipelines, and what is refused.

The models are tiny and random, of the same classes as the released ones, saved to disk and loaded (tests/tiny_models.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

pytest.importorskip("transformers", reason="backbones are not tested: pip install 'world2act[backbones]'")

from services.worldmodel import serving
from services.worldmodel.backbones import BACKBONES, BackboneMemoryError, cosmos_predict2, load_backbone, weights_hash
from services.worldmodel.backbones.folder import ModelError
from services.worldmodel.settings import WorldModelSettings
from tests import tiny_models
from tests.integration.triton_process import make_zoo

HEIGHT, WIDTH = 32, 64
DIFFUSION = sorted(tiny_models.BUILDERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tiny model."""
    root = tmp_path_factory.mktemp("models")
    for name in DIFFUSION:
        tiny_models.build(name, root / name)
    make_zoo(root / "zoo")
    return root


def settings(models: Path, name: str, **changes: Any) -> WorldModelSettings:
    if name == "small":
        return WorldModelSettings(backbone="small", zoo=models / "zoo", **changes)
    values = {
        "backbone_model": str(models / name),
        "backbone_size": f"{HEIGHT}x{WIDTH}",
        "backbone_frames": 17,
        "guardrail": False,
    }
    return WorldModelSettings(backbone=name, **{**values, **changes})


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    return {name: load_backbone(settings(models, name), "cpu") for name in BACKBONES}


def starts(rows: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), np.uint8)


# --- the contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BACKBONES))
def test_contract(loaded: dict[str, Any], models: Path, name: str) -> None:
    """Shapes, dtypes, determinism, independence of rows, declared compression, both latent modes."""
    backbone = loaded[name]
    info, M = backbone.info, backbone.info.temporal_compression
    assert info.name == name and info.max_horizon >= 2 and info.fps > 0
    assert weights_hash(settings(models, name), "cpu") == info.hash and len(info.hash) == 64
    frames = starts(3, info.frame_shape)
    frames[:, info.active_rows :] = 0
    prompts, seeds = ["open the drawer", "push the puck", "open the drawer"], [5, 6, 2**62]
    latents = backbone.imagine(frames, prompts, seeds, 2, 3, 1.5)
    assert latents.shape == (3, 3, *info.latent_shape) and latents.dtype == np.float32 and np.isfinite(latents).all()
    np.testing.assert_allclose(latents[:, 0], backbone.encode(frames[:, None])[:, 0], atol=1e-5)  # latent 0 is the start
    again = backbone.imagine(frames[1:2], prompts[1:2], seeds[1:2], 2, 3, 1.5)
    np.testing.assert_allclose(again[0], latents[1], atol=1e-5)
    for changed in ({"seeds": [7]}, {"prompts": ["close the drawer"]}, {"start": frames[:1]}):
        other = backbone.imagine(
            **{"start": frames[1:2], "prompts": prompts[1:2], "seeds": seeds[1:2], **changed}, horizon=2, steps=3, guidance=1.5
        )
        assert np.abs(other[:, 1:] - again[:, 1:]).max() > 1e-6, changed
    clips = backbone.decode(latents)
    assert clips.shape == (3, 1 + 2 * M, *info.frame_shape) and clips.dtype == np.uint8
    assert np.array_equal(backbone.last_frame(latents), clips[:, -1])
    true = backbone.encode(clips)
    once = backbone.denoise_once(clips, prompts, seeds)
    assert once.shape == true.shape == latents.shape and np.allclose(once[:, 0], true[:, 0], atol=1e-5)
    assert np.array_equal(once, backbone.denoise_once(clips, prompts, seeds)) and not np.allclose(once, true)


@pytest.mark.parametrize("name", list(BACKBONES))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon: 0 is outside"),
        ({"horizon": 99}, "horizon: 99 is outside"),
        ({"steps": -1}, "steps: -1 is outside"),
        ({"prompts": ["a", "b"]}, r"prompts, seeds: need one per"),
        ({"start": np.zeros((1, 8, 8, 3), np.float32)}, "frames: "),
    ],
)
def test_bad_calls_name_the_field(loaded: dict[str, Any], name: str, change: dict[str, Any], message: str) -> None:
    backbone = loaded[name]
    call = {
        "start": starts(1, backbone.info.frame_shape),
        "prompts": ["a"],
        "seeds": [0],
        "horizon": 1,
        "steps": 3,
        "guidance": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        backbone.imagine(**{**call, **change})


def test_own_steps_and_guidance_stand_for_zero(loaded: dict[str, Any]) -> None:
    backbone = loaded["cosmos_predict2"]
    frame = starts(1, backbone.info.frame_shape)
    assert (backbone.info.steps, backbone.info.guidance) == (35, 8.0)
    own = backbone.imagine(frame, ["push"], [0], 1, 0, 0.0)
    assert np.array_equal(own, backbone.imagine(frame, ["push"], [0], 1, 35, 8.0))


@pytest.mark.parametrize("name", DIFFUSION)
def test_start_frames_of_another_size_are_letterboxed(loaded: dict[str, Any], name: str) -> None:
    backbone = loaded[name]
    square = np.full((1, 64, 64, 3), 255, np.uint8)
    boxed = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    boxed[:, :, 16:48] = 255
    assert np.array_equal(backbone.imagine(square, ["a"], [0], 1, 2, 1.0), backbone.imagine(boxed, ["a"], [0], 1, 2, 1.0))


# --- the same numbers as diffusers' pipelines ----------------------------------------------------------------------------


class Unchecked:
    """A guardrail that lets everything through, and remembers."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.seen, self.videos = refuse, [], 0
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def to(self, *args: Any) -> Unchecked:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        self.seen.append(prompt)
        return not self.refuse or self.refuse not in prompt

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray | None:
        self.videos += 1
        return None if self.refuse == "video" else frames


def by_diffusers(
    backbone: Any, frame: np.ndarray, prompt: str, seed: int, horizon: int, steps: int, guidance: float
) -> torch.Tensor:
    """Latents (1, C, K, h, w) of diffusers' own pipeline on the same components and noise."""
    import diffusers
    from PIL import Image

    M, image, parts = backbone.info.temporal_compression, Image.fromarray(frame), dict(backbone.parts)
    noise = backbone.noise(seed, 1 + horizon)
    common = {"num_frames": 1 + M * horizon, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    size = {"height": HEIGHT, "width": WIDTH}
    if backbone.name == "cosmos_predict2":
        pipe = diffusers.Cosmos2VideoToWorldPipeline(**parts, safety_checker=Unchecked())
        return pipe(image=image, prompt=prompt, latents=noise, guidance_scale=guidance - 1, fps=16, **size, **common)[0]
    if backbone.name == "wan22":
        pipe = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
        texts = {"prompt_embeds": backbone.text(prompt)["text"], "negative_prompt_embeds": backbone.text("")["text"]}
        return pipe(image=image, latents=noise, guidance_scale=guidance, **texts, **size, **common)[0]
    if backbone.name == "ltx_video":
        pipe = diffusers.LTXConditionPipeline(**parts)
        condition = diffusers.pipelines.ltx.pipeline_ltx_condition.LTXVideoCondition(image=image)
        more = {"image_cond_noise_scale": 0.0, "frame_rate": 16, "max_sequence_length": 256, "guidance_scale": guidance}
        generator = torch.Generator().manual_seed(seed)  # it draws its noise itself
        texts = {"prompt": prompt, "negative_prompt": ""}
        return pipe(conditions=condition, generator=generator, **texts, **more, **size, **common)[0]
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance)
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(**parts, guider=guider)
    pipe.video_processor.calculate_default_height_width = lambda **_: (HEIGHT, WIDTH)
    return pipe(image=image, prompt=prompt, latents=noise, **common)[0]


@pytest.mark.parametrize("name", DIFFUSION)
def test_equals_diffusers_own_pipeline(loaded: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same noise: the same latents, guidance included."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # Some pipelines draw the start latent from its posterior; ours is its mean, so that latents are a function of the clip.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    backbone = loaded[name]
    frame = starts(1, backbone.info.frame_shape)
    ours = backbone.imagine(frame, ["open the drawer"], [3], 2, 6, 2.5)[0]
    theirs = by_diffusers(backbone, frame[0], "open the drawer", 3, 2, 6, 2.5)[0].transpose(0, 1).numpy()
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=2e-4)
    assert np.abs(ours[1:] - backbone.noise(3, 3)[0].transpose(0, 1).numpy()[1:]).mean() > 0.01, "the model did something"


# --- settings ------------------------------------------------------------------------------------------------------------


def test_step_caching_computes_less_and_stays_near(models: Path) -> None:
    frame = starts(1, (HEIGHT, WIDTH, 3))
    exact, cached = (load_backbone(settings(models, "wan22", backbone_cache=share), "cpu") for share in (0.0, 1.0))
    a, b = (m.imagine(frame, ["push"], [0], 2, 10, 1.0) for m in (exact, cached))
    assert exact.evaluations == 10 and cached.evaluations < 8
    assert 0 < np.abs(a - b).mean() < 0.2 * np.abs(a).mean()
    assert exact.info.hash != cached.info.hash, "other latents, another name"


def test_bfloat16_and_compile_are_settings(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    half = load_backbone(settings(models, "cosmos_predict2", backbone_dtype="bfloat16", backbone_compile=True), "cpu")
    assert compiled and next(half.transformer.parameters()).dtype == torch.bfloat16
    latents = half.imagine(starts(1, (HEIGHT, WIDTH, 3)), ["push"], [0], 1, 3, 1.0)
    assert latents.dtype == np.float32 and np.isfinite(latents).all()


def test_time_and_memory_of_a_clip_are_logged(loaded: dict[str, Any]) -> None:
    with structlog.testing.capture_logs() as logs:
        loaded["wan22"].imagine(starts(1, (HEIGHT, WIDTH, 3)), ["push"], [0], 1, 3, 1.0)
    (line,) = [entry for entry in logs if entry["event"] == "clip imagined"]
    assert line["seconds"] >= 0 and line["peak_mib"] > 0 and line["evaluations"] == "3 of 3" and line["frames"] == 5


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_prompt_that_is_too_long_is_cut_with_a_warning(loaded: dict[str, Any], name: str) -> None:
    backbone = loaded[name]
    head = "open " * (2 * backbone.tokens)
    with structlog.testing.capture_logs() as logs:
        embedded = backbone.text(head + "drawer")
    warned = [entry for entry in logs if "too long" in entry["event"]]
    assert warned and warned[0]["log_level"] == "warning" and warned[0]["limit"] == backbone.tokens < warned[0]["tokens"]
    assert torch.equal(embedded["text"], backbone.text(head + "puck")["text"]), "the end is not read"
    assert not torch.equal(embedded["text"], backbone.text("open the drawer")["text"])


def test_the_camera_layout_is_told_before_the_prompt(models: Path) -> None:
    told = load_backbone(settings(models, "cosmos_predict2", backbone_layout="libero"), "cpu")
    plain = load_backbone(settings(models, "cosmos_predict2"), "cpu")
    assert told.info.hash != plain.info.hash
    with_layout = plain.text(f"{cosmos_predict2.diffusion.LAYOUTS['libero']} push")["text"]
    assert torch.equal(told.text("push")["text"], with_layout) and not torch.equal(plain.text("push")["text"], with_layout)


# --- guardrail -----------------------------------------------------------------------------------------------------------


def test_the_guardrail_is_on_unless_switched_off(models: Path) -> None:
    """The package is not installed here: loading says what to do, and nothing is imagined unchecked."""
    with pytest.raises(ModelError, match=r"guardrail: package cosmos_guardrail is not installed.*W2A_GUARDRAIL=false"):
        load_backbone(settings(models, "cosmos_predict2", guardrail=True), "cpu")
    assert WorldModelSettings().guardrail is True


def test_the_guardrail_sees_prompts_and_frames(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Unchecked(refuse="knife")
    monkeypatch.setattr(cosmos_predict2, "make_guardrail", lambda: guard)
    backbone = load_backbone(settings(models, "cosmos_predict2", guardrail=True), "cpu")
    latents = backbone.imagine(starts(1, (HEIGHT, WIDTH, 3)), ["push"], [0], 1, 3, 1.0)
    backbone.decode(latents)
    assert guard.seen == ["push"] and guard.videos == 1
    with pytest.raises(ValueError, match="prompt: the guardrail refuses 'throw the knife'"):
        backbone.imagine(starts(1, (HEIGHT, WIDTH, 3)), ["throw the knife"], [0], 1, 3, 1.0)
    guard.refuse = "video"
    with pytest.raises(ValueError, match="frames: the guardrail refuses"):
        backbone.decode(latents)


# --- bad folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "component 'vae' is missing"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "component 'text_encoder' is missing"),
        (lambda f: [p.unlink() for p in (f / "transformer").glob("*.safetensors")], "component 'transformer' has no weights"),
        (
            lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
            "transformer cannot be loaded",
        ),
        (lambda f: (f / "model_index.json").unlink(), "has neither model_index.json"),
        (lambda f: (f / "model_index.json").write_text("[1"), "model_index.json is no JSON object"),
        (
            lambda f: retell(f, "text_encoder", "T5ForSomethingElse"),
            "'text_encoder' is a T5ForSomethingElse, need T5EncoderModel",
        ),
        (lambda f: retell(f, "transformer", None), "does not name component 'transformer'"),
    ],
)
def test_an_unusable_folder_is_named(models: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = shutil.copytree(models / "cosmos_predict2", tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_backbone(settings(models, "cosmos_predict2", backbone_model=str(folder)), "cpu")


def retell(folder: Path, component: str, kind: str | None) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_another_wan_is_not_taken_for_this_one(models: Path, tmp_path: Path) -> None:
    """Wan's other image-to-video models get the start frame as more channels."""
    folder = shutil.copytree(models / "wan22", tmp_path / "model")
    from diffusers import WanTransformer3DModel

    config = WanTransformer3DModel.load_config(folder / "transformer")
    WanTransformer3DModel.from_config({**config, "in_channels": 12}).save_pretrained(folder / "transformer")
    with pytest.raises(ModelError, match=r"takes 12 channels and latents have 4; wan22 is Wan 2\.2 TI2V"):
        load_backbone(settings(models, "wan22", backbone_model=str(folder)), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_model": ""}, "W2A_BACKBONE_MODEL: backbone cosmos_predict2 needs"),
        ({"backbone_model": "no such folder"}, "neither a folder nor the id"),
        ({"backbone_size": "30x64"}, "backbone_size: height 30 must be a multiple of 16"),
        ({"backbone_frames": 16}, r"backbone_frames: must be 1 \+ a multiple of 4"),
    ],
)
def test_unusable_settings_are_named(models: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_backbone(settings(models, "cosmos_predict2", **changes), "cpu")


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'nvidia/Cosmos' is no folder here, and the hub does not give it"):
        load_backbone(settings(tmp_path, "cosmos_predict2", backbone_model="nvidia/Cosmos"), "cpu")


def test_size_must_be_a_size() -> None:
    with pytest.raises(ValueError, match="must be HEIGHTxWIDTH"):
        WorldModelSettings(backbone_size="big")


def test_a_vae_that_compresses_otherwise_is_not_served(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LTX's released VAE makes one latent of eight frames; with four it would be served."""
    for key, value in {
        "BACKBONE": "ltx_video",
        "BACKBONE_MODEL": str(models / "ltx_video"),
        "BACKBONE_SIZE": "32x64",
        "BACKBONE_FRAMES": "17",
    }.items():
        monkeypatch.setenv(f"W2A_{key}", value)
    with pytest.raises(ValueError, match=r"ltx_video makes one latent of 8 frames, but an action chunk is M = 4 actions"):
        serving.load_worldmodel("cpu")
    monkeypatch.setenv("W2A_BACKBONE_MODEL", str(tiny_models.build("ltx_video", tmp_path / "four", time=4)))
    assert serving.load_worldmodel("cpu").backbone.info.temporal_compression == 4


# --- out of memory -------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_said_and_survived(models: Path) -> None:
    """For real: a clip of four million million frames."""
    server = serving.WorldModelServer(load_backbone(settings(models, "wan22", backbone_frames=4 * 10**12 + 1), "cpu"))
    frame = starts(1, (HEIGHT, WIDTH, 3))

    def call(horizon: int) -> serving.Call:
        return serving.Call(frame, ["push"], [0], horizon, 2, 1.0, frozenset({"latents"}))

    huge, small = server.run([call(10**12), call(1)])
    assert isinstance(huge, BackboneMemoryError) and "out of memory for a clip of 1000000000001 latents at 32x64 on cpu" in str(
        huge
    )
    assert isinstance(small, dict) and small["latents"].shape[1] == 2, "the next call works"
