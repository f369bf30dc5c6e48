"""Runs the benchmarks, prints their tables and writes them to files."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
from typing import Any

import jax
from cases import SECTIONS
from harness import FULL, QUICK, Row
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jdropout", "jax", "jaxlib", "flax", "equinox", "dm-haiku", "optax", "numpy")
LEGEND = """\
a / b is the time of a divided by the time of b: median ± half the interquartile range. In sections
on memory it is bytes. A dash means not installed or not measured."""


def main() -> None:
    options = parse_arguments()
    environment = describe_environment(options.date)
    names = [environment["device"].replace(" ", "-"), f"jax{environment['jax']}", *options.only]
    path = options.output / "-".join([*names, "quick"] if options.quick else names)

    # No spinner or progress bar: its thread would run alongside the timed code.
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(*(f"{name}: {value}" for name, value in environment.items()), sep="\n")
    sections: dict[str, list[Row]] = {}
    for name in options.only or SECTIONS:
        sections[name] = list(SECTIONS[name](QUICK if options.quick else FULL))
        console.print(f"\n[bold]{name}[/bold]: {SECTIONS[name].__doc__}", table(sections[name]))
    console.print(LEGEND)

    options.output.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.json").write_text(as_json(environment, sections))
    path.with_name(f"{path.name}.md").write_text(as_markdown(environment, sections))
    console.print(f"Written to {path}.json and .md")


def parse_arguments() -> argparse.Namespace:
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small arrays and few rounds, as a trial")
    add("--only", action="append", default=[], choices=SECTIONS, help="may be repeated")
    add("--output", type=pathlib.Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    add("--date", default=today, help="date to write into the files (default: today)")
    return parser.parse_args()


def describe_environment(date: str) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = jax.default_backend() == "cpu"
    environment = {
        "device": f"cpu {cores}core" if on_cpu else jax.devices()[0].device_kind.lower(),
        "cores": cores,
        "cpu": cpu_model(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in PACKAGES:
        try:
            environment[package] = importlib.metadata.version(package)
        except ImportError:
            environment[package] = "-"
    script = f"benchmarks/{pathlib.Path(sys.argv[0]).name}"
    command = shlex.join(["python", script, *sys.argv[1:]])
    return {**environment, "date": date, "command": command}


def cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor()


def table(rows: list[Row], style: box.Box = box.ROUNDED) -> Table:
    made = Table(box=style)
    for label in rows[0].labels:
        made.add_column(label)
    for cell in rows[0].cells:
        made.add_column(cell, justify="right")
    for row in rows:
        made.add_row(*row.labels.values(), *map(str, row.cells.values()))
    return made


def as_json(environment: dict[str, Any], sections: dict[str, list[Row]]) -> str:
    def plain(row: Row) -> dict[str, Any]:
        cells = {k: c if isinstance(c, str) else c._asdict() for k, c in row.cells.items()}
        return {**row.labels, **cells, **row.details}

    plain_sections = {name: [plain(row) for row in rows] for name, rows in sections.items()}
    return json.dumps({"environment": environment, "sections": plain_sections}, indent=1) + "\n"


def as_markdown(environment: dict[str, Any], sections: dict[str, list[Row]]) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.out("# Benchmarks\n", *(f"- {k}: {v}" for k, v in environment.items()), sep="\n")
        console.out(f"\n{LEGEND}")
        for name, rows in sections.items():
            console.out(f"\n## {name}\n\n{SECTIONS[name].__doc__}\n")
            console.print(table(rows, box.MARKDOWN))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", captured.get())).strip() + "\n"


if __name__ == "__main__":
    main()
