"""What the diffusion backbones share: load, sample, noise and denoise once, decode. A file beside this one says what differs.

All of them are flow-matching models: x_t = (1 - t) x0 + t noise, and the transformer predicts v = noise - x0. So one function,
`velocity`, serves sampling (full denoising), the one-step latent, and fine-tuning. Latents inside are (B, C, K, h, w), normalised
as the transformer expects; latent 0 is the start frame's. Sampling takes the same steps as diffusers' own pipelines
(tests/conformance/test_backbones.py compares them).
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import structlog
import torch

from services.worldmodel.backbones import BackboneInfo, BackboneMemoryError, Frames, Latents
from services.worldmodel.backbones.folder import NOT_WEIGHTS, ModelError, ModelFolder, open_folder
from services.worldmodel.backbones.layouts import LAYOUTS
from services.worldmodel.settings import WorldModelSettings
from world2act.data.grid import letterbox

log = structlog.get_logger()

Condition = dict[str, torch.Tensor]
"""What a clip is conditioned on beside its start latent: text embeddings, image embeddings; each with a row dimension."""
MAX_STEPS = 1000
KEPT_PROMPTS = 256


class DiffusionBackbone(ABC):
    """The contract `Backbone` around the components of a diffusers pipeline.

    Clips are computed one by one: at full size one clip fills a GPU, and a row can then not depend on the rows beside it.
    """

    name: ClassVar[str]
    components: ClassVar[Mapping[str, tuple[str, ...]]]
    """Component -> classes that will do; no other class is ever loaded."""
    size: ClassVar[tuple[int, int]] = (480, 832)
    frames: ClassVar[int] = 93
    fps: ClassVar[float] = 16.0
    steps: ClassVar[int] = 35
    guidance: ClassVar[float] = 5.0
    negative: ClassVar[str] = ""
    tokens: ClassVar[int] = 512
    """Tokens that the text encoder reads."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Components that stay in float32 whatever the precision."""
    given_first: ClassVar[bool] = True
    """Whether latent 0 is given in its place, and not denoised."""
    lora_rank: ClassVar[int | None] = None
    """Rank with which the paper fine-tunes it; None: whole."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self, folder: ModelFolder, settings: WorldModelSettings, device: str, only: Collection[str] | None = None
    ) -> None:
        """only: components to load, for who does not need all of them (the VAE always)."""
        folder.check(self.components)
        self.folder, self.settings, self.device = folder, settings, torch.device(device)
        self.dtype = precision(settings, device)
        self.height, self.width, self.clip_frames, self.layout = shape_of(type(self), folder, settings)
        self.parts: dict[str, Any] = {name: self._load(name) for name in self.components if only is None or name in only}
        self.transformer: Any = self.parts.get("transformer")
        self.vae = self.parts["vae"]
        if self.transformer is not None and (lora := folder.lora()) is not None:
            self.transformer.load_lora_adapter(str(lora.parent), weight_name=lora.name, prefix=None)
        if settings.backbone_compile:
            self.transformer = torch.compile(self.transformer)
        self._embedded: dict[str, Condition] = {}
        ratio, patch = self.compression(folder)
        for field, value in (("height", self.height), ("width", self.width)):
            if value % (ratio[1] * patch):
                raise ModelError(f"backbone_size: {field} {value} must be a multiple of {ratio[1] * patch} for {self.name}")
        if (self.clip_frames - 1) % ratio[0] or self.clip_frames <= ratio[0]:
            raise ModelError(f"backbone_frames: must be 1 + a multiple of {ratio[0]} for {self.name}, got {self.clip_frames}")
        self.info = BackboneInfo(
            name=self.name,
            hash=result_hash(type(self), folder, settings, device),
            frame_shape=(self.height, self.width, 3),
            active_rows=self.height,
            latent_shape=(self.channels(), self.height // ratio[1], self.width // ratio[1]),
            temporal_compression=ratio[0],
            max_horizon=(self.clip_frames - 1) // ratio[0],
            fps=float(folder.note.get("fps", self.fps)),
            steps=self.steps,
            guidance=self.guidance,
            letterboxes=True,
            rows=1,
        )

    # --- what a backbone's own file says -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def compression(cls, folder: ModelFolder) -> tuple[tuple[int, int], int]:
        """((frames per latent, pixels per latent cell), latent cells per token side), from the folder's configurations."""

    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @abstractmethod
    def embed(self, prompt: str) -> Condition:
        """One prompt (with the camera layout) -> text embeddings, each (1, ...)."""

    @abstractmethod
    def velocity(self, x: torch.Tensor, start: torch.Tensor, t: torch.Tensor, given: Condition) -> torch.Tensor:
        """v at times t (B,) for x (B, C, K, h, w), whose latent 0 is of no account; start (B, C, 1, h, w). float32."""

    @abstractmethod
    def times(self, steps: int) -> torch.Tensor:
        """The times between which sampling steps, decreasing; the last is where it ends."""

    @abstractmethod
    def normalise(self, moments: torch.Tensor) -> torch.Tensor:
        """The VAE's latents -> the transformer's."""

    @abstractmethod
    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`."""

    def look(self, start: Frames) -> Condition:
        """What else the model takes from a start frame uint8 (H, W, 3)."""
        return {}

    def first(self, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Where sampling begins."""
        return noise

    def advance(self, x: torch.Tensor, v: torch.Tensor, i: int, times: torch.Tensor) -> torch.Tensor:
        """From times[i] to times[i + 1]."""
        return x + (times[i + 1] - times[i]) * v

    def _load(self, component: str) -> Any:
        """A component, in evaluation mode on the device. Weights are read from safetensors only."""
        import diffusers
        import transformers

        place, kind = self.folder.place(component), self.folder.kind(component)
        library = diffusers if component in ("transformer", "vae", "scheduler") else transformers
        try:
            if component.startswith("tokenizer"):
                return transformers.AutoTokenizer.from_pretrained(place)
            if component in NOT_WEIGHTS:
                return getattr(library, kind).from_pretrained(place)
            dtype = torch.float32 if component in self.exact else self.dtype
            named = "torch_dtype" if library is diffusers else "dtype"
            network = getattr(library, kind).from_pretrained(place, use_safetensors=True, **{named: dtype})
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"model folder {place.parent}: {component} cannot be loaded: {str(error)[:300]}") from None
        return network.to(self.device).eval().requires_grad_(False)

    # --- conditions ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def text(self, prompt: str) -> Condition:
        """Text embeddings of a skill prompt, with the camera layout before it; computed once. A prompt that is too long for the
        encoder is cut, with a warning. '' stands for no condition and has no layout."""
        if prompt not in self._embedded:
            full = " ".join(f"{self.layout} {prompt}".split()) if prompt not in ("", self.negative) else prompt
            if (found := self.count(full)) > self.tokens:
                log.warning("prompt is too long, its end is not read", tokens=found, limit=self.tokens, prompt=prompt[:80])
            if len(self._embedded) >= KEPT_PROMPTS:
                self._embedded.pop(next(iter(self._embedded)))
            self._embedded[prompt] = self.embed(full)
        return self._embedded[prompt]

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, uncut."""
        return len(self.parts["tokenizer"](prompt).input_ids)

    def check_text(self, prompt: str) -> None:
        """Raise ValueError for a prompt that the model's licence forbids."""
        return None

    def check_video(self, frames: Frames) -> Frames:
        """Frames (T, H, W, 3) as the model's licence lets them go out. Raises ValueError where it does not."""
        return frames

    # --- sampling --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, start: torch.Tensor, given: Condition, free: Condition | None, noise: torch.Tensor, steps: int, guidance: float
    ) -> torch.Tensor:
        """Full denoising of noise (1, C, K, h, w) from a start latent; `free`: the unconditional condition, with guidance."""
        times = self.times(steps).to(self.device)
        x = self.first(noise, times)
        predict = _Reusing(self.settings.backbone_cache)
        for i in range(len(times) - 1):
            t = times[i].expand(1).float()

            def velocity(x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:
                v = self.velocity(x, start, t, given)
                if free is not None:
                    without = self.velocity(x, start, t, free)
                    v = without + guidance * (v - without)
                return v

            x = self.advance(x, predict(velocity, last=i == len(times) - 2), i, times)
        self.evaluations = predict.computed
        x = x / (1 - times[-1])
        return torch.cat([start, x[:, :, 1:]], dim=2)

    def imagine(
        self, start: Frames, prompts: Sequence[str], seeds: Sequence[int], horizon: int, steps: int = 0, guidance: float = 0.0
    ) -> Latents:
        """See `Backbone.imagine`."""
        steps, guidance = steps or self.steps, guidance or self.guidance
        _check_rows(start, prompts, seeds)
        if not 1 <= horizon <= self.info.max_horizon:
            raise ValueError(f"horizon: {horizon} is outside [1, {self.info.max_horizon}]")
        if not 2 <= steps <= MAX_STEPS:
            raise ValueError(f"steps: {steps} is outside [2, {MAX_STEPS}]")
        for prompt in prompts:
            self.check_text(prompt)
        rows = [
            self._guarded(partial(self._row, f, p, s, horizon, steps, guidance), horizon)
            for f, p, s in zip(start, prompts, seeds, strict=True)
        ]
        return np.stack(rows)

    def _row(self, frame: Frames, prompt: str, seed: int, horizon: int, steps: int, guidance: float) -> Latents:
        began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        frame = letterbox(frame, self.height, self.width)
        seen = self.look(frame)
        free = {**self.text(self.negative), **seen} if guidance != 1.0 else None
        first = self.encode_frames(frame[None])
        noise = self.noise(seed, 1 + horizon)
        latents = self.sample(first, {**self.text(prompt), **seen}, free, noise, steps, guidance)
        log.info(
            "clip imagined",
            frames=1 + horizon * self.info.temporal_compression,
            seconds=round(time.perf_counter() - began, 3),
            peak_mib=round(peak_memory(self.device)),
            evaluations=f"{self.evaluations} of {len(self.times(steps)) - 1}",
        )
        return _to_numpy(latents)

    def noise(self, seed: int, latents: int) -> torch.Tensor:
        """Standard normal (1, C, K, h, w), the same on every device."""
        shape = (1, self.info.latent_shape[0], latents, *self.info.latent_shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed) % 2**63)).to(self.device)

    @torch.no_grad()
    def denoise_once(self, frames: Frames, prompts: Sequence[str], seeds: Sequence[int]) -> Latents:
        """See `Backbone.denoise_once`."""
        _check_rows(frames, prompts, seeds)
        rows = []
        for clip, prompt, seed in zip(frames, prompts, seeds, strict=True):
            self.check_text(prompt)
            clip = letterbox(clip, self.height, self.width)
            x0 = self.encode_frames(clip)
            t = random_time(1, torch.Generator().manual_seed(int(seed) % 2**63)).to(self.device)
            x = (1 - t) * x0 + t * self.noise(seed, x0.shape[2])
            v = self.velocity(x, x0[:, :, :1], t, {**self.text(prompt), **self.look(clip[0])})
            rows.append(_to_numpy(torch.cat([x0[:, :, :1], (x - t * v)[:, :, 1:]], dim=2)))
        return np.stack(rows)

    # --- frames ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_frames(self, frames: Frames) -> torch.Tensor:
        """Frames uint8 (1+M*n, H, W, 3) of the model's size -> latents (1, C, 1+n, h, w), the posterior's mean; float32."""
        x = torch.tensor(frames, device=self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        return self.normalise(self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().float())

    def encode(self, frames: Frames) -> Latents:
        """See `Backbone.encode`."""
        return np.stack([_to_numpy(self.encode_frames(letterbox(clip, self.height, self.width))) for clip in frames])

    @torch.no_grad()
    def decode(self, latents: Latents) -> Frames:
        """See `Backbone.decode`."""
        clips = []
        for row in latents:
            x = self.denormalise(torch.tensor(row, device=self.device).transpose(0, 1)[None].float())
            decoded = self._guarded(partial(self._decode, x), latents.shape[1] - 1)
            pixels = ((decoded[0].float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
            clips.append(self.check_video(pixels.permute(1, 2, 3, 0).cpu().numpy()))
        return np.stack(clips)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents -> frames (1, 3, T, H, W) in [-1, 1]."""
        frames: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return frames

    def last_frame(self, latents: Latents) -> Frames:
        """See `Backbone.last_frame`. A causal decoder needs all latents before."""
        return self.decode(latents)[:, -1]

    def _guarded(self, work: Callable[[], Any], horizon: int) -> Any:
        """`work`, with a sentence instead of torch's report where memory does not suffice."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            reason = str(error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BackboneMemoryError(
            f"{self.name}: out of memory for a clip of {1 + horizon} latents at {self.height}x{self.width} on {self.device}; ask "
            f"for a shorter one or lower W2A_BACKBONE_SIZE ({' '.join(reason.split())[:200]})"
        )


class _Reusing:
    """Step caching: where two predictions in a row differ by less than `threshold` (mean absolute change over mean absolute
    value), the next one is not computed but is the one before; never two in a row, never the last."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.computed = threshold, 0
        self.before: torch.Tensor | None = None
        self.reuse = False

    def __call__(self, compute: Callable[[], torch.Tensor], last: bool) -> torch.Tensor:
        if self.reuse and not last and self.before is not None:
            self.reuse = False
            return self.before
        v = compute()
        self.computed += 1
        if self.threshold and self.before is not None:
            self.reuse = bool((v - self.before).abs().mean() < self.threshold * v.abs().mean())
        self.before = v
        return v


def random_time(rows: int, generator: torch.Generator, mean: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    """Times t (rows,) for training and the one-step latent: logit(t) is normal, which is a log-normal sigma = t / (1 - t)."""
    return torch.sigmoid(mean + spread * torch.randn(rows, generator=generator))


def precision(settings: WorldModelSettings, device: str) -> torch.dtype:
    """The setting, where "auto" is bfloat16 on a GPU and float32 on a CPU."""
    auto = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[
        auto if settings.backbone_dtype == "auto" else settings.backbone_dtype
    ]


def shape_of(kind: type[DiffusionBackbone], folder: ModelFolder, settings: WorldModelSettings) -> tuple[int, int, int, str]:
    """(height, width, frames of the longest clip, layout as text): the settings', else the folder note's, else the model's."""
    height, width = settings.size() or folder.note.get("size") or kind.size
    frames = settings.backbone_frames or folder.note.get("frames") or kind.frames
    layout = settings.backbone_layout if settings.backbone_layout != "auto" else folder.note.get("layout", "none")
    return int(height), int(width), int(frames), LAYOUTS[str(layout)]


def result_hash(kind: type[DiffusionBackbone], folder: ModelFolder, settings: WorldModelSettings, device: str) -> str:
    """sha256 of the weights and of every setting that changes a latent."""
    height, width, _, layout = shape_of(kind, folder, settings)
    changes = [kind.name, height, width, layout, kind.negative, str(precision(settings, device)), settings.backbone_cache]
    return hashlib.sha256(json.dumps([folder.hash(kind.components), changes]).encode()).hexdigest()


def load(kind: type[DiffusionBackbone], settings: WorldModelSettings, device: str) -> DiffusionBackbone:
    """From W2A_BACKBONE_MODEL. Raises ModelError."""
    return kind(_folder(settings, kind), settings, device)


def weights_hash(kind: type[DiffusionBackbone], settings: WorldModelSettings, device: str) -> str:
    """`load(...).info.hash` without loading."""
    folder = _folder(settings, kind)
    folder.check(kind.components)
    return result_hash(kind, folder, settings, device)


def _folder(settings: WorldModelSettings, kind: type[DiffusionBackbone]) -> ModelFolder:
    if not settings.backbone_model:
        raise ModelError(f"W2A_BACKBONE_MODEL: backbone {kind.name} needs the folder or hub id of its weights")
    return open_folder(settings.backbone_model)


def peak_memory(device: torch.device) -> float:
    """MiB: on a GPU the most that torch has held since the last reset, else the process' largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _check_rows(frames: Frames, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if frames.dtype != np.uint8 or frames.ndim < 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: must be uint8 (rows, ..., H, W, 3), got {frames.dtype} {frames.shape}")
    if len(prompts) != len(frames) or len(seeds) != len(frames):
        raise ValueError(f"prompts, seeds: need one per row ({len(frames)}), got {len(prompts)} and {len(seeds)}")


def _to_numpy(latents: torch.Tensor) -> Latents:
    """(1, C, K, h, w) -> float32 (K, C, h, w)."""
    array: Latents = latents[0].transpose(0, 1).float().cpu().numpy()
    return array
