"""A large LIBERO file through `/segment`, gateway and segmenter as processes: MB/s, and how much memory they take for it.

Peer: copying the file on the same disk and hashing it, which whoever keeps uploads by content has to do. Memory is the peak of
each process (VmHWM).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from bench.imagination import free_ports
from bench.segmentation import FRAMES, demonstration_file, widths
from services.cli.settings import CliSettings
from services.cli.specs import http_ready, service_specs
from services.cli.supervisor import Supervisor

SIZE = 256
"""Pixels of a camera's side, two cameras."""
SMALL, LARGE = 2, 64
"""Demonstrations: 64 and 2,000 MB."""
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
SERVICES = ("redis", "segmenter", "gateway")


def settings_in(folder: Path) -> CliSettings:
    """Settings on ports that are free."""
    offset = free_ports(1)[0] % 9000 + 1000
    return CliSettings(port_offset=offset, run_dir=folder / "run", artifacts_url=f"file://{folder}/artifacts").shifted()


def peak_mb(pid: int) -> float:
    """The most memory that a process has had, its children's too."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return own + sum(peak_mb(int(child)) for child in children)


def copy_and_hash(path: Path) -> float:
    """Seconds."""
    started, digest = time.perf_counter(), hashlib.sha256()
    with path.open("rb") as file, path.with_suffix(".copy").open("wb") as copy:
        while block := file.read(1 << 20):
            digest.update(block)
            copy.write(block)
    path.with_suffix(".copy").unlink()
    return time.perf_counter() - started


def run() -> list[dict[str, object]]:
    """Rows {name, value, unit, ratio}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_in(folder)
        # Not /readyz, which waits for services that are left out here.
        answers = http_ready(f"http://{settings.host}:{settings.gateway_port}/healthz")
        specs = [spec for spec in service_specs(settings) if spec.name in SERVICES]
        specs = [replace(spec, ready=answers) if spec.name == "gateway" else spec for spec in specs]
        with Supervisor(specs, folder / "run", start_timeout_s=120) as supervisor:
            pids = {name: supervisor.services[name].process.pid for name in ("gateway", "segmenter")}  # type: ignore[union-attr]
            rows, before = [], {}
            for demos in (SMALL, LARGE):
                path = folder / f"{demos}.hdf5"
                demonstration_file(path, [np.minimum(w, 0.08) for w in widths(demos)], SIZE, INSTRUCTION)
                megabytes = path.stat().st_size / 1e6
                alone = copy_and_hash(path)
                started = time.perf_counter()
                with path.open("rb") as file:
                    url = f"http://{settings.host}:{settings.gateway_port}/segment"
                    reply = httpx.post(url, files={"file": file}, timeout=600).raise_for_status().json()
                seconds = time.perf_counter() - started
                peaks = {service: peak_mb(pid) for service, pid in pids.items()}
                before = before or peaks
                clips = sum(len(episode["skills"]) for episode in reply["episodes"])
                rows.append(
                    {
                        "name": f"upload and cut {megabytes:,.0f} MB, {demos} demonstrations of {FRAMES} frames, {clips} clips",
                        "value": megabytes / seconds,
                        "unit": "MB/s",
                        "ratio": f"{alone / seconds:.2f} of copying and hashing it",
                    }
                )
                path.unlink()
            rows += [
                {
                    "name": f"{service}, peak memory after the large file",
                    "value": peaks[service],
                    "unit": "MB",
                    "ratio": f"{peaks[service] - before[service]:+.0f} MB to after the small one",
                }
                for service in pids
            ]
            return rows
