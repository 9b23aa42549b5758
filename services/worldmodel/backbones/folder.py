"""A world model's folder in the diffusers layout (model_index.json and a folder for each component), checked before it is loaded.

A fine-tuned model is a folder of its own that holds only what was trained (`transformer/` whole, or LoRA weights) and
world2act.json, which names its base and says what it was trained at; every other component is the base's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOTE = "world2act.json"
LORA = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves and looks for LoRA weights."""
NOT_WEIGHTS = frozenset({"scheduler", "tokenizer", "tokenizer_2", "feature_extractor"})


class ModelError(ValueError):
    """A model folder that cannot be used: what is missing, or what it is instead."""


@dataclass(frozen=True)
class ModelFolder:
    """path: the folder; note: its world2act.json, or {}; base: the model it was fine-tuned from, or None."""

    path: Path
    note: dict[str, Any] = field(default_factory=dict)
    base: ModelFolder | None = None

    def place(self, component: str) -> Path:
        """The folder of a component, here or in the base. Raises ModelError naming it."""
        folder = self.path / component
        if folder.is_dir():
            return folder
        if self.base is not None:
            return self.base.place(component)
        raise ModelError(f"model folder {self.path}: component {component!r} is missing")

    def lora(self) -> Path | None:
        """Its LoRA weights, if it has any."""
        file = self.path / LORA
        return file if file.is_file() else None

    def check(self, components: Mapping[str, tuple[str, ...]]) -> None:
        """components: name -> classes that will do. Raises ModelError naming one that is missing or of another class."""
        for name, classes in components.items():
            folder = self.place(name)
            if name not in NOT_WEIGHTS and not list(folder.glob("*.safetensors")):
                raise ModelError(f"model folder {folder.parent}: component {name!r} has no weights (*.safetensors)")
            if (found := self.kind(name)) not in classes:
                raise ModelError(f"model folder {folder.parent}: component {name!r} is a {found}, need {' or '.join(classes)}")

    def write_note(self, note: dict[str, Any]) -> None:
        """Write world2act.json, whole or not at all."""
        temporary = self.path / f".{NOTE}"
        temporary.write_text(json.dumps(note, indent=2))
        temporary.replace(self.path / NOTE)

    def kind(self, component: str) -> str:
        """The class of a component, as model_index.json says."""
        if self.base is not None:
            return self.base.kind(component)
        entry = _json(self.path / "model_index.json").get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise ModelError(f"model folder {self.path}: model_index.json does not name component {component!r}")
        return str(entry[1])

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration, {} where it has none."""
        file = self.place(component) / "config.json"
        return _json(file) if file.is_file() else {}

    def hash(self, components: Iterable[str]) -> str:
        """sha256 (hex) of what decides a latent: every file of the components, LoRA weights, sizes in the note."""
        files = {f"{name}/{p.name}": p for name in components for p in sorted(self.place(name).iterdir()) if p.is_file()}
        if (lora := self.lora()) is not None:
            files[LORA] = lora
        digest = hashlib.sha256(json.dumps({k: v for k, v in self.note.items() if k in SETTINGS}, sort_keys=True).encode())
        for name in sorted(files):
            with files[name].open("rb") as content:
                digest.update(f"{name}\n{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


SETTINGS = ("size", "frames", "fps", "layout", "lora")
"""What a note says of how a model was trained, and so is to be used."""


def open_folder(model: str) -> ModelFolder:
    """A local folder, or a model of the hub by its id (needs the network once). Raises ModelError."""
    path = Path(model)
    if not path.is_dir():
        path = _download(model)
    if not (path / NOTE).is_file():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"model folder {path}: has neither model_index.json (a diffusers model) nor {NOTE} (a fine-tuned one)"
            )
        return ModelFolder(path)
    note = _json(path / NOTE)
    if (base := note.get("base")) is None:
        return ModelFolder(path, note)
    try:
        return ModelFolder(path, note, open_folder(str(base)))
    except ModelError as error:
        raise ModelError(f"model folder {path}: its base {base!r} (see {NOTE}) cannot be had: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ModelError(f"model folder {file.parent}: {file.name} is no JSON object") from None


def _download(model: str) -> Path:
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(f"model: {model!r} is neither a folder nor the id of a hub's model (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only: nothing that would have to be unpickled is even fetched.
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(f"model: {model!r} is no folder here, and the hub does not give it: {reason}") from None
