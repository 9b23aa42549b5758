"""What LIBERO keeps in files: tasks, shipped initial states, meshes. Read without importing LIBERO, and without unpickling.

The package `hf-libero` holds BDDL files (task, objects, regions, goal) and 50 initial states a task, but no meshes. These are
looked for, in this order: W2A_LIBERO_ASSETS (a folder or an archive), the `assets` entry of LIBERO's own config.yaml, the
package's `assets` folder, and the folder that LIBERO's own download fills. LIBERO itself would download them, or ask on
standard input; here neither happens.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickletools
import re
import shutil
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog

from services.simulator.envs.base import InvalidInputError, TaskSpec
from services.simulator.settings import SimulatorSettings
from world2act.types import M

log = structlog.get_logger()

STEP_LIMITS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Suite -> actions per episode that published evaluations allow."""
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
ARRAY_OPCODES = {"PROTO", "GLOBAL", "MARK", "REDUCE", "BUILD", "STOP", "NONE", "NEWFALSE", "NEWTRUE", "BINUNICODE"} | {
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
}
"""Opcodes of a pickled array: no list, no dictionary."""
STAND_IN_MARK = "STAND-INS"
STAND_IN_WARNING = (
    "LIBERO runs with STAND-IN MESHES: pictures and some masses differ; results are NOT comparable with published numbers"
)


@cache
def package() -> Path:
    """The folder of `libero.libero`. Raises InvalidInputError when hf-libero is not installed."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise InvalidInputError("simulator: libero needs hf-libero, which is not installed; run scripts/setup.sh libero")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def missing() -> str:
    """Why LIBERO cannot run here; empty where it can."""
    try:
        package()
        assets()
    except InvalidInputError as error:
        return str(error)
    return ""


def bddl_file(task: str) -> Path:
    """The BDDL file of our task name `<suite>-<LIBERO's task name>`."""
    suite, name = task.split("-", 1)
    return package() / "bddl_files" / suite / f"{name}.bddl"


def instruction(name: str) -> str:
    """LIBERO's rule for what policies are told: the task's name without its scene, with spaces.

    The BDDL's own :language differs in words ("the top layer of the drawer"); published evaluations do not use it.
    """
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


def tasks() -> tuple[TaskSpec, ...]:
    """All tasks of the four suites, sorted within a suite."""
    found = []
    for suite, limit in STEP_LIMITS.items():
        for path in sorted((package() / "bddl_files" / suite).glob("*.bddl")):
            found.append(TaskSpec(f"{suite}-{path.stem}", instruction(path.stem), limit // M))
    return tuple(found)


def problem_class(task: str) -> str:
    """The name under which LIBERO registers the task's simulator class."""
    found = re.search(r"\(problem (\w+)\)", bddl_file(task).read_text())
    if found is None:
        raise InvalidInputError(f"task: {bddl_file(task).name} names no problem")
    return found[1].lower()


def initial_states(task: str) -> npt.NDArray[np.float64]:
    """The shipped initial states of a task: (50, 1 + nq + nv) of MuJoCo's time, qpos, qvel."""
    suite, name = task.split("-", 1)
    return read_array(package() / "init_files" / suite / f"{name}.pruned_init")


def read_array(path: Path) -> npt.NDArray[np.float64]:
    """The one 2-d float64 array of a `torch.save` file, its pickle read as a list of opcodes and never executed.

    Raises InvalidInputError where the file holds anything else.
    """
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("data.pkl")), "")
        operations = [(op.name, arg) for op, arg, _ in pickletools.genops(archive.read(name))] if name else []
    names = {str(arg) for op, arg in operations if op == "GLOBAL"}
    expected = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "_codecs encode", "numpy dtype"}
    ops = [op for op, _ in operations]
    texts = [str(arg) for op, arg in operations if op == "BINUNICODE"]
    if set(ops) <= ARRAY_OPCODES and names == expected and "f8" in texts and "<" in texts and ops.count("TUPLE2") >= 2:
        # ..., MARK, version, rows, columns, TUPLE2 (the shape), dtype, ..., the bytes as a latin-1 text
        end = next((i for i, op in enumerate(ops) if op == "TUPLE2" and ops[i - 1].startswith("BININT")), 0)
        rows, columns = (int(str(arg)) for _, arg in operations[end - 2 : end]) if end else (0, 0)
        data = max(texts, key=len).encode("latin-1")
        if rows > 0 and columns > 0 and len(data) == rows * columns * 8:
            return np.frombuffer(data, "<f8").reshape(rows, columns)
    raise InvalidInputError(f"initial states: {path.name} is not one 2-d array of little-endian float64")


def assets() -> Path:
    """The folder of meshes. Raises InvalidInputError that says where they were looked for."""
    setting = SimulatorSettings()
    if setting.libero_assets:
        given = Path(setting.libero_assets).expanduser().resolve()
        if given.is_file():
            given = unpack(given, setting.run_dir)
        check_assets(given, "W2A_LIBERO_ASSETS")
        if (given / STAND_IN_MARK).exists():
            log.warning(STAND_IN_WARNING)
        return given
    for candidate in (configured_assets(), package() / "assets", Path.home() / ".cache/libero/assets"):
        if candidate is not None and candidate.is_dir():
            check_assets(candidate, "LIBERO's assets")
            return candidate
    raise InvalidInputError(
        "W2A_LIBERO_ASSETS: LIBERO's meshes are not here. Download them (see LIBERO's README) and name their folder, or name "
        "the archive of stand-ins"
    )


def configured_assets() -> Path | None:
    """The `assets` entry of the user's LIBERO config, if there is one."""
    config = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    found = re.search(r"^assets:\s*(\S+)\s*$", config.read_text(), re.MULTILINE) if config.is_file() else None
    return Path(found[1]) if found else None


def check_assets(folder: Path, field: str) -> None:
    """Raise InvalidInputError naming `field` unless `folder` holds what LIBERO's XML files refer to."""
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InvalidInputError(f"{field}: {folder} has no {', '.join(missing)}")


def unpack(archive: Path, run_dir: Path) -> Path:
    """Unpack an archive of stand-in meshes into `run_dir`, once; returns the folder, marked as stand-ins."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = (run_dir / f"libero-assets-{digest[:12]}").resolve()
    if target.is_dir():
        return target
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=run_dir))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        inside = [p for p in (temporary, *temporary.iterdir()) if (p / ASSET_FOLDERS[0]).is_dir()]
        if not inside:
            raise InvalidInputError(f"W2A_LIBERO_ASSETS: {archive.name} has no folder {ASSET_FOLDERS[0]}")
        (inside[0] / STAND_IN_MARK).write_text(STAND_IN_WARNING + "\n")
        try:
            inside[0].rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    except (tarfile.TarError, EOFError) as error:
        raise InvalidInputError(f"W2A_LIBERO_ASSETS: {archive.name} is not a readable archive: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def configure() -> Path:
    """Prepare what LIBERO reads on import, so that it never asks on standard input. Returns the folder of meshes."""
    meshes = assets()
    if "LIBERO_CONFIG_PATH" not in os.environ:
        folder = (SimulatorSettings().run_dir / "libero").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        root = package()
        entries = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": meshes,
        }
        text = "".join(f"{key}: {json.dumps(str(value))}\n" for key, value in entries.items())  # JSON strings are YAML
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        Path(file.name).replace(folder / "config.yaml")
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return meshes
