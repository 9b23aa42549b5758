"""Fine-tuning a large world model on skill clips (METHOD section 2): flow matching, whole or LoRA, on one process or many.

    world2act train-worldmodel --backbone cosmos_predict2 --model FOLDER --data DEMOS --out OUT [--processes 8 --fsdp]

1. Clips become latents and text embeddings once (windows.py); VAE and text encoder are then only in the way and are dropped.
2. x_t = (1-t) x0 + t noise at a random t; the transformer learns v = noise - x0 on latents 1 .. n, under start and prompt.
3. OUT holds what was trained (a running average) and world2act.json, which names the base. Load it as W2A_BACKBONE_MODEL=OUT.

Every draw is a function of (seed, step, micro-batch, process), so a run that stopped goes on to the same bits with --resume and
the same number of processes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
import torch
import tyro

from services.worldmodel import checkpoint
from services.worldmodel.backbones import BACKBONES, diffusion
from services.worldmodel.backbones.diffusion import DiffusionBackbone, random_time
from services.worldmodel.backbones.folder import ModelError, ModelFolder, open_folder
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.windows import Cache, cache_name, fill, finish, read_episodes
from world2act.console import Progress, no_progress, progress_display
from world2act.data.video import encode_mp4
from world2act.splits import Split

log = structlog.get_logger()
PAPER_RATE = 2**-14.5
"""Learning rate of the paper's whole fine-tuning."""
LORA_RATE = 1e-4


@dataclass(frozen=True)
class Settings:
    """Fine-tune a large world model. Weights of the base are never changed."""

    backbone: str
    """A name in services/worldmodel/backbones."""
    model: str
    """The base: a folder in the diffusers layout, a folder that this command made, or a hub's id."""
    data: Path
    """Demonstrations: <data>/<split>/<task>.hdf5 of this project, or anything that its readers know."""
    out: Path
    """Folder of the result."""
    held_out: Path | None = None
    """Demonstrations for the samples to look at; by default split validation of `data`, if it has one."""
    method: Literal["paper", "full", "lora"] = "paper"
    """paper: whole for Cosmos-Predict2, LoRA for the others with the paper's ranks."""
    rank: int | None = None
    """Of LoRA; by default the paper's: LTX-Video 128, Wan2.2 32, HunyuanVideo-1.5 8."""
    segmented: bool = True
    """False trains on whole episodes with their instruction: Base-WM instead of Skill-WM."""
    steps: int = 10_000
    batch: int = 1
    """Clips of a process and micro-batch."""
    accumulate: int = 1
    """Micro-batches of a step."""
    rate: float | None = None
    """Learning rate; by default the paper's 2^-14.5, and 1e-4 with LoRA."""
    warmup: int = 100
    weight_decay: float = 1e-2
    clip: float = 1.0
    averaging: float = 0.999
    """Decay of the running average of the weights, which is what is saved; 0: none."""
    text_dropout: float = 0.1
    time_mean: float = 0.0
    time_spread: float = 1.0
    """logit(t) of the training times is normal with these."""
    size: tuple[int, int] | None = None
    """(height, width) of frames; by default the backbone's 480 x 832."""
    frames: int | None = None
    """Frames of the longest clip; by default the backbone's."""
    layout: Literal["none", "robocasa", "libero", "metaworld"] = "none"
    """Camera layout told before each prompt."""
    limit: int | None = None
    """Episodes a task at most."""
    processes: int = 1
    fsdp: bool = False
    """Shard weights, gradients and optimiser over the processes."""
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    resume: bool = False
    checkpoint_steps: int = 500
    sample_steps: int = 500
    """Every so many steps clips are imagined, beside the true ones, into OUT/samples; 0: never."""
    sample_clips: int = 2
    sample_denoising: int = 10
    log_steps: int = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    cache: Path | None = None
    """Latents and text embeddings; by default OUT/cache. Runs may share one."""
    threads: int = 1

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES or self.backbone == "small":
            raise ValueError(
                f"backbone: {self.backbone!r} is unknown; choose one of {', '.join(sorted(set(BACKBONES) - {'small'}))}"
            )
        for name in ("steps", "batch", "accumulate", "processes", "checkpoint_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        if self.fsdp and self.processes < 2:
            raise ValueError("fsdp: needs --processes of 2 at least")
        if "wandb" in self.trackers and importlib.util.find_spec("wandb") is None:
            raise ValueError("trackers: wandb is not installed: pip install wandb")

    def identity(self) -> str:
        """What must not change between a run and its continuation."""
        free = (
            "steps",
            "resume",
            "checkpoint_steps",
            "sample_steps",
            "sample_clips",
            "sample_denoising",
            "log_steps",
            "trackers",
            "threads",
        )
        values = {k: str(v) for k, v in asdict(self).items() if k not in (*free, "out", "cache")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Run:
    """One process of a fine-tuning."""

    def __init__(self, settings: Settings, progress: Progress = no_progress) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.settings, self.progress = settings, progress
        self.kind: type[DiffusionBackbone] = _kind(settings.backbone)
        self.folder = open_folder(settings.model)
        if self.folder.lora() is not None:
            raise ModelError(f"model: {settings.model} is a LoRA of another model already; name its base")
        rank = settings.rank or self.kind.lora_rank
        self.rank = {"paper": settings.rank or self.kind.lora_rank, "full": None, "lora": rank or 32}[settings.method]
        cpu = not torch.cuda.is_available()
        half = settings.precision == "bfloat16" or (settings.precision == "auto" and not cpu)
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if half else "no",
            gradient_accumulation_steps=settings.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            log_with=list(settings.trackers),
            project_dir=str(settings.out),
        )
        self.device = str(self.accelerator.device)
        self.step = 0

    # --- data ------------------------------------------------------------------------------------------------------------

    def backbone_settings(self, dtype: Literal["auto", "float32", "bfloat16"]) -> WorldModelSettings:
        s = self.settings
        return WorldModelSettings(
            backbone=s.backbone,
            backbone_model=s.model,
            backbone_size=f"{s.size[0]}x{s.size[1]}" if s.size else "",
            backbone_frames=s.frames or 0,
            backbone_dtype=dtype,
            backbone_layout=s.layout,
        )

    def prepare_data(self) -> tuple[Cache, Cache | None]:
        """The clips to train on and to look at, from the cache or encoded now, each process its share."""
        s, settings = self.settings, self.backbone_settings("auto")
        own = (s.data / Split.VALIDATION.value).is_dir()
        wanted = [(s.data, Split.WORLDMODEL)] + ([(s.held_out or s.data, Split.VALIDATION)] if s.held_out or own else [])
        digest = diffusion.result_hash(self.kind, self.folder, settings, self.device)
        height, width, frames, _ = diffusion.shape_of(self.kind, self.folder, settings)
        horizon = (frames - 1) // self.kind.compression(self.folder)[0][0]
        root = s.cache or s.out / "cache"
        places = [root / cache_name(digest, data, split, s.segmented, s.limit, horizon) for data, split in wanted]
        todo = [(place, *source) for place, source in zip(places, wanted, strict=True) if not Cache(place).clips]
        if todo:
            only = set(self.kind.components) - {"transformer", "scheduler"}
            encoder = self.kind(self.folder, settings, self.device, only)
            part = (self.accelerator.process_index, self.accelerator.num_processes)
            for place, data, split in todo:
                kept = fill(place, encoder, read_episodes(data, split, s.limit), s.segmented, part, self.progress)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    finish(place, kept)
            del encoder
        self.accelerator.wait_for_everyone()
        caches = [Cache(place) for place in places]
        self.note = {
            "base": s.model if not Path(s.model).is_dir() else str(Path(s.model).resolve()),
            "size": [height, width],
            "frames": frames,
            "fps": float(self.folder.note.get("fps", self.kind.fps)),
            "layout": s.layout,
        }
        return caches[0], caches[1] if len(caches) > 1 and caches[1].clips else None

    # --- model -----------------------------------------------------------------------------------------------------------

    def prepare_model(self) -> None:
        """Transformer (with LoRA, or whole), optimiser, running average; distributed as asked."""
        s = self.settings
        # Frozen weights need no float32; but a shard's weights must be of one type.
        half = self.rank is not None and self.device != "cpu" and not s.fsdp
        only = {"transformer", "vae", "scheduler"}
        self.backbone = self.kind(self.folder, self.backbone_settings("bfloat16" if half else "float32"), self.device, only)
        transformer = self.backbone.transformer
        if self.rank is None:
            transformer.requires_grad_(True)
        else:
            from diffusers.training_utils import cast_training_params
            from peft import LoraConfig

            torch.manual_seed(s.seed)  # LoRA's A is random: the same on every process
            targets = list(self.kind.lora_targets)
            transformer.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets))
            cast_training_params(transformer, dtype=torch.float32)
        if s.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        self.model = checkpoint.shard(transformer, self.device) if s.fsdp else self.accelerator.prepare(transformer)
        self.backbone.transformer = self.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.rate = s.rate or (PAPER_RATE if self.rank is None else LORA_RATE)
        optimiser = torch.optim.AdamW(self.trained, lr=self.rate, betas=(0.9, 0.95), weight_decay=s.weight_decay)
        self.optimiser = self.accelerator.prepare(optimiser)
        self.average = [p.detach().clone() for p in self.trained]

    # --- training --------------------------------------------------------------------------------------------------------

    def generator(self, step: int, micro: int) -> torch.Generator:
        """The draws of one micro-batch of one process."""
        name = f"{self.settings.seed}/{step}/{micro}/{self.accelerator.process_index}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big"))

    def loss(self, cache: Cache, generator: torch.Generator) -> torch.Tensor:
        """Flow matching on one micro-batch."""
        s = self.settings
        x0, given = cache.batch(s.batch, s.text_dropout, generator)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        t = random_time(len(x0), generator, s.time_mean, s.time_spread).to(self.device)
        x0, given = x0.to(self.device), {name: value.to(self.device) for name, value in given.items()}
        at = t.view(-1, 1, 1, 1, 1)
        with self.accelerator.autocast():
            v = self.backbone.velocity((1 - at) * x0 + at * noise, x0[:, :, :1], t, given)
        return (v - (noise - x0))[:, :, int(self.kind.given_first) :].square().mean()

    def one_step(self, cache: Cache) -> dict[str, float]:
        """One optimiser step of `accumulate` micro-batches; the mean loss over them and all processes."""
        s, total = self.settings, torch.zeros((), device=self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / max(1, s.warmup))
        norm = torch.zeros(())
        for micro in range(s.accumulate):
            with self.accelerator.accumulate(self.model):
                loss = self.loss(cache, self.generator(self.step, micro))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.trained, s.clip)
                self.optimiser.step()
                self.optimiser.zero_grad()
            total += loss.detach() / s.accumulate
        keep = min(s.averaging, (1 + self.step) / (10 + self.step)) if s.averaging else 0.0
        with torch.no_grad():
            for average, parameter in zip(self.average, self.trained, strict=True):
                average.lerp_(parameter.detach(), 1 - keep)
        self.step += 1
        mean = self.accelerator.reduce(total, "mean")
        return {"loss": float(mean), "gradient": float(getattr(norm, "full_tensor", lambda: norm)()), "rate": group["lr"]}

    def train(self) -> dict[str, Any]:
        """All of it. Returns the card."""
        s = self.settings
        torch.set_num_threads(s.threads)
        began = time.perf_counter()
        cache, held_out = self.prepare_data()
        encoded = time.perf_counter()
        self.prepare_model()
        if s.resume:
            self.step = checkpoint.load(s.out, s.identity(), self.accelerator, self.trained, self.average, self.optimiser)
        self.accelerator.init_trackers("training", config={k: str(v) for k, v in asdict(s).items()})
        first, values = self.step, {"loss": float("nan")}
        while self.step < s.steps:
            values = self.one_step(cache)
            if self.step % s.log_steps == 0 or self.step == s.steps:
                self.accelerator.log(values, step=self.step)
            self.progress("fine-tuning", self.step, s.steps, values)
            if self.step % s.checkpoint_steps == 0 or self.step == s.steps:
                checkpoint.save(s.out, s.identity(), self.accelerator, self.trained, self.average, self.optimiser, self.step)
            if s.sample_steps and self.step % s.sample_steps == 0:
                self.sample(held_out or cache)
        done = time.perf_counter()
        card = {
            "settings": json.loads(json.dumps(asdict(s), default=str)),
            "rank": self.rank,
            "processes": self.accelerator.num_processes,
            "trained_parameters": sum(p.numel() for p in self.trained),
            "sharded": s.fsdp,
            "clips": len(cache.clips),
            "loss": values["loss"],
            "seconds": {"encoding": round(encoded - began, 1), "a_step": round((done - encoded) / max(1, self.step - first), 3)},
            "peak_mib": round(diffusion.peak_memory(self.accelerator.device)),
        }
        self.export(card)
        self.accelerator.end_training()
        return card

    # --- results ---------------------------------------------------------------------------------------------------------

    def _swap(self) -> None:
        """Exchange the weights and their running average."""
        with torch.no_grad():
            for average, parameter in zip(self.average, self.trained, strict=True):
                latest = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(latest)

    @torch.no_grad()
    def sample(self, cache: Cache) -> None:
        """Imagine some clips with the running average; mp4 files with the true clip above. All processes compute (a sharded model
        needs them all), the first writes."""
        s, backbone = self.settings, self.backbone
        folder = s.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        self._swap()
        self.model.eval()
        for number in np.linspace(0, len(cache.clips) - 1, min(s.sample_clips, len(cache.clips))).astype(int):
            true, seen = cache.clip(int(number))
            true = true.to(self.device)
            given, free = (
                {k: v.to(self.device) for k, v in {**cache.text(p), **seen}.items()} for p in (cache.clips[number].prompt, "")
            )
            noise = backbone.noise(s.seed + int(number), true.shape[2])
            imagined = backbone.sample(true[:, :, :1], given, free, noise, s.sample_denoising, backbone.guidance)
            if self.accelerator.is_main_process:
                rows = torch.cat([true, imagined]).transpose(1, 2).float().cpu().numpy()
                both = np.concatenate(list(backbone.decode(rows)), axis=1)
                name = f"step-{self.step:06d}-clip-{number:04d}.mp4"
                (folder / name).write_bytes(encode_mp4(both, round(backbone.info.fps)))
        self.model.train()
        self._swap()
        self.accelerator.wait_for_everyone()

    def export(self, card: dict[str, Any]) -> None:
        """The running average, and the note that makes the folder a model. The note comes last: a folder without it is none."""
        self._swap()
        plain = self.accelerator.unwrap_model(self.model)
        state = checkpoint.whole_state(plain)
        self._swap()
        if self.accelerator.is_main_process:
            checkpoint.write_weights(self.settings.out, plain, state, self.rank is not None)
            note = self.note | ({"lora": {"rank": self.rank}} if self.rank is not None else {}) | {"card": card}
            ModelFolder(self.settings.out).write_note(note)
        self.accelerator.wait_for_everyone()


def _kind(name: str) -> type[DiffusionBackbone]:
    module = importlib.import_module(BACKBONES[name])
    kinds = [
        k
        for k in vars(module).values()
        if isinstance(k, type) and issubclass(k, DiffusionBackbone) and k is not DiffusionBackbone
    ]
    return next(k for k in kinds if k.name == name)


def main(arguments: list[str]) -> None:
    """Command line; with --processes more than one, starts them and waits."""
    try:
        settings = tyro.cli(Settings, args=arguments, prog="world2act train-worldmodel", description=__doc__)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if settings.processes > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.processes}"]
        raise SystemExit(subprocess.call([*launch, "-m", "services.worldmodel.training", *arguments]))
    try:
        with progress_display() as progress:
            run = Run(settings, no_progress)
            if run.accelerator.is_main_process:
                run.progress = progress
            card = run.train()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())[:1000]}") from None
    if run.accelerator.is_main_process:
        print(json.dumps({k: card[k] for k in ("loss", "clips", "trained_parameters", "seconds", "peak_mib")}, indent=2))
        print(f"{settings.out}: W2A_BACKBONE={settings.backbone} W2A_BACKBONE_MODEL={settings.out}")
