"""Checkpoints of a fine-tuning, and its result: safetensors only, each written whole or not at all.

Each process keeps its own part (a shard, or with plain data parallelism the whole): weights, running average, AdamW's moments. No
random state is needed, because every draw is a function of the step (finetune.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from services.worldmodel.backbones.folder import LORA

FOLDER = "checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def shard(transformer: Any, device: str) -> Any:
    """Shard weights, gradients and optimiser state over all processes, block by block (torch's FSDP2), in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in getattr(transformer, "transformer_blocks", None) or transformer.blocks:
        fully_shard(block, mesh=mesh)
    # By default the root keeps its weights gathered until a backward pass: after samples, which have none, training would go on
    # with the running average's.
    return fully_shard(transformer, mesh=mesh, reshard_after_forward=True)


def whole_state(transformer: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered from their shards, on the CPU; on the first process only. Every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not any(hasattr(p, "to_local") for p in transformer.parameters()):
        return dict(transformer.state_dict())
    gathered: Any = get_model_state_dict(transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(gathered)


def save(
    out: Path,
    identity: str,
    accelerator: Any,
    trained: list[torch.nn.Parameter],
    average: list[torch.Tensor],
    optimiser: Any,
    step: int,
) -> None:
    """Replace OUT/checkpoint by the state after `step`."""
    partial, final = out / f"{FOLDER}.partial", out / FOLDER
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    tensors: dict[str, torch.Tensor] = {}
    for i, (parameter, mean) in enumerate(zip(trained, average, strict=True)):
        tensors |= {f"weight.{i}": _local(parameter), f"average.{i}": _local(mean)}
        # A parameter that no loss reaches (the last block's text stream, in some) has no moments.
        moments = optimiser.state.get(parameter) or dict.fromkeys(MOMENTS, torch.zeros_like(parameter))
        tensors |= {f"{name}.{i}": _local(moments[name]) for name in MOMENTS}
    state = {"step": step, "identity": identity, "processes": accelerator.num_processes}
    kept = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, partial / f"{accelerator.process_index}.safetensors", {"state": json.dumps(state)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    accelerator.wait_for_everyone()


def load(
    out: Path, identity: str, accelerator: Any, trained: list[torch.nn.Parameter], average: list[torch.Tensor], optimiser: Any
) -> int:
    """Put a checkpoint back; returns its step, 0 where there is none. Raises ValueError where it is of another run."""
    file = out / FOLDER / f"{accelerator.process_index}.safetensors"
    if not (out / FOLDER).is_dir():
        return 0
    if not file.is_file():
        raise ValueError(f"resume: {out / FOLDER} has no part for process {accelerator.process_index}: it is of fewer processes")
    with safe_open(file, "pt") as kept:
        state = json.loads(kept.metadata()["state"])
        if state["processes"] != accelerator.num_processes:
            raise ValueError(
                f"resume: {out / FOLDER} is of {state['processes']} processes, these are {accelerator.num_processes}"
            )
        if state["identity"] != identity:
            raise ValueError(f"resume: {out / FOLDER} is of a run with other settings")
        with torch.no_grad():
            for i, (parameter, mean) in enumerate(zip(trained, average, strict=True)):
                _local(parameter).copy_(kept.get_tensor(f"weight.{i}"))
                _local(mean).copy_(kept.get_tensor(f"average.{i}"))
                moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                for name, moment in moments.items():
                    _local(moment).copy_(kept.get_tensor(f"{name}.{i}"))
                optimiser.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
    return int(state["step"])


def write_weights(out: Path, transformer: Any, state: dict[str, torch.Tensor], lora: bool) -> None:
    """The trained part of a model's state: LoRA weights alone, or the whole transformer in diffusers' layout."""
    out.mkdir(parents=True, exist_ok=True)
    if lora:
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(transformer, state_dict=state, adapter_name="default")
        partial = out / f".{LORA}"
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, partial, {"format": "pt"})
        partial.replace(out / LORA)
        return
    with torch.device("meta"):
        plain = type(transformer).from_config(transformer.config)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in state.items()}, assign=True)
    partial_folder = out / ".transformer"
    shutil.rmtree(partial_folder, ignore_errors=True)
    plain.save_pretrained(partial_folder)
    shutil.rmtree(out / "transformer", ignore_errors=True)
    partial_folder.rename(out / "transformer")
