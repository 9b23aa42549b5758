"""`python -m bench [name ...]`: run every benchmark (or those named) and print one table; `--json FILE` also writes it."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import bench


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if not m.name.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names, []], help=", ".join(names))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    rows: list[dict[str, object]] = []
    for name in arguments.names or names:
        with console.status(f"measuring {name}"):
            rows += [{"bench": name, **row} for row in importlib.import_module(f"bench.{name}").run()]
    table = Table("bench", "what", "value", "unit", "ratio", title="Rates on this machine; ratios are within one run")
    for row in rows:
        value = row["value"]
        ratio = row.get("ratio")
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(str(row["bench"]), str(row["name"]), shown, str(row["unit"]), str(ratio) if ratio else "")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
