"""A world model of Cosmos-Predict2's architecture at 2B (random weights): time, memory and tokens of a clip; and the
residual policy's time per chunk with CUDA graphs (goal < 0.3 ms).

On a GPU: 480 x 832, 93 frames, 35 steps with guidance, bfloat16, through the same backbone code that Triton serves. Without
one the same bench runs at small size and says so. Random weights take the time and the memory of trained ones.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from services.worldmodel.backbones.cosmos_predict2 import CosmosPredict2
from services.worldmodel.backbones.diffusion import peak_memory
from services.worldmodel.backbones.folder import ModelFolder
from services.worldmodel.settings import WorldModelSettings
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.normalisation import Statistics
from world2act.types import M

REAL: dict[str, Any] = {"heads": 16, "width": 128, "layers": 28, "text": 1024, "adaln": 256, "vae": 96, "z": 16}
SMALL: dict[str, Any] = {"heads": 2, "width": 32, "layers": 2, "text": 32, "adaln": 16, "vae": 8, "z": 16}
"""Sizes of Cosmos-Predict2 2B Video2World (28 layers of width 2048) and of the stand-in."""
CHUNKS = 200


def device_name() -> str:
    """The GPU's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (no GPU here)"


class _Prompts(CosmosPredict2):
    """Without its text encoder: T5's embeddings are kept per prompt and cost a clip nothing, so random ones stand for them."""

    def count(self, prompt: str) -> int:
        return 1

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        width = self.transformer.config.text_embed_dim
        return {"text": torch.randn(1, self.tokens, width, device=self.device, dtype=self.dtype)}


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A model folder with random weights, on disk."""
    from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    parts = {
        "transformer": CosmosTransformer3DModel(  # type: ignore[no-untyped-call]
            in_channels=sizes["z"] + 1,
            out_channels=sizes["z"],
            num_attention_heads=sizes["heads"],
            attention_head_dim=sizes["width"],
            num_layers=sizes["layers"],
            mlp_ratio=4.0,
            text_embed_dim=sizes["text"],
            adaln_lora_dim=sizes["adaln"],
            max_size=(128, 240, 240),
            patch_size=(1, 2, 2),
            rope_scale=(1.0, 3.0, 3.0),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        ).to(dtype),
        "vae": AutoencoderKLWan(base_dim=sizes["vae"], z_dim=sizes["z"]).to(dtype),  # type: ignore[no-untyped-call]
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),  # type: ignore[no-untyped-call]
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))


def clip() -> list[dict[str, object]]:
    """One clip, after one to warm up."""
    gpu = torch.cuda.is_available()
    device, sizes = ("cuda", REAL) if gpu else ("cpu", SMALL)
    size, frames, steps = ("480x832", 93, 35) if gpu else ("64x96", 17, 6)
    settings = WorldModelSettings(backbone="cosmos_predict2", backbone_size=size, backbone_frames=frames, guardrail=False)
    only = {"transformer", "vae", "scheduler"}
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), sizes)
        _Prompts.components = {name: CosmosPredict2.components[name] for name in sorted(only)}
        backbone = _Prompts(ModelFolder(Path(place)), settings, device, only)
    start = np.random.default_rng(0).integers(0, 256, (1, backbone.height, backbone.width, 3), np.uint8)
    horizon = backbone.info.max_horizon

    def run() -> tuple[float, float]:
        began = time.perf_counter()
        latents = backbone.imagine(start, ["pick up the cup"], [0], horizon, steps, 8.0)
        imagined = time.perf_counter()
        backbone.decode(latents)
        return imagined - began, time.perf_counter() - imagined

    backbone.imagine(start, ["pick up the cup"], [0], horizon, 2, 8.0)
    denoising, decoding = run()
    tokens = (1 + horizon) * (backbone.height // 16) * (backbone.width // 16)
    parameters = sum(p.numel() for p in backbone.transformer.parameters())
    count = f"{parameters / 1e9:.2f}B" if parameters > 1e9 else f"{parameters / 1e6:.2f}M"
    what = f"Cosmos architecture, {count} random, {size}x{frames}, {steps} steps, guidance, {device_name()}"
    evaluations = 2 * (steps - 1)
    return [
        {
            "name": f"{what}: latents",
            "value": denoising,
            "unit": "s/clip",
            "ratio": f"{denoising / evaluations * 1e3:.0f} ms a pass",
        },
        {"name": "the same: decoding all frames", "value": decoding, "unit": "s/clip", "ratio": ""},
        {"name": "the same: tokens of a pass", "value": float(tokens), "unit": "tokens", "ratio": ""},
        {
            "name": "the same: peak memory",
            "value": peak_memory(backbone.device),
            "unit": "MiB",
            "ratio": "" if gpu else "process",
        },
    ]


def median_ms(work: Callable[[], object]) -> float:
    """Median time of `work` in milliseconds, the device waited for."""
    times = []
    for _ in range(CHUNKS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def residual() -> list[dict[str, object]]:
    """The residual policy alone, one observation: what it adds to a base policy's chunk."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.ones(4)), "0" * 64)
    rows: list[dict[str, object]] = []
    visions: tuple[Literal["latent", "pixels"], ...] = ("latent", "pixels")
    for vision in visions:
        # Without the instruction's token: the paper's residual has none, and reading text is not part of a graph.
        settings = ResidualSettings(vision=vision, instruction=False)
        policy = ResidualPolicy.from_adapters(settings, adapters).to(device).eval().requires_grad_(False)
        visual = torch.zeros(1, *settings.latent_shape) if vision == "latent" else torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
        inputs = (visual.to(device), torch.zeros(1, settings.state_size, device=device), torch.zeros(1, M, 4, device=device))
        with torch.no_grad():
            eager = median_ms(partial(policy, *inputs, [""]))
            rows.append({"name": f"residual, {vision} vision, {device_name()}", "value": eager, "unit": "ms/chunk", "ratio": ""})
            if device == "cuda":
                graphed = median_ms(cuda_graph(policy, inputs))
                goal = "goal 0.3 ms: " + ("met" if graphed < 0.3 else "missed")
                rows.append(
                    {"name": f"the same with a CUDA graph, {vision}", "value": graphed, "unit": "ms/chunk", "ratio": goal}
                )
    return rows


def cuda_graph(policy: Any, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """The policy captured once and replayed."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            policy(*inputs, [""])
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        policy(*inputs, [""])
    return graph.replay


def run() -> list[dict[str, object]]:
    """Rows for `python -m bench`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*clip(), *residual()]
    finally:
        torch.set_num_threads(threads)
