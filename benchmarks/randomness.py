"""Runs batteries of tests on the laws' random bits, and on streams with known flaws.

    python benchmarks/randomness.py                       # all runs of PLAN: hours
    python benchmarks/randomness.py --only smallcrush --only ent
    python benchmarks/randomness.py --table               # only reads the logs

A run pipes a stream of `stream.py` into a battery, and keeps what the battery prints as a log in
`--logs`; a run that has one is not repeated. The p-values go to results/randomness.md. Batteries
are programs to be installed: ent and dieharder, RNG_test of PractRand, and testu01_stdin, which
`testu01_stdin.c` compiles to.
"""

import argparse
import datetime
import importlib.metadata
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scipy import stats

HERE = pathlib.Path(__file__).parent
RESULT = HERE / "results" / "randomness.md"

PValues = Iterator[tuple[str, float]]
"""The names of tests, and their p-values, two-sided but for dieharder's."""


def two_sided(p_value: float, upper: bool = False) -> float:
    """Of a p-value or, with `upper`, of what it lacks to 1."""
    return 2 * p_value if upper else 2 * min(p_value, 1 - p_value)


class Battery(NamedTuple):
    """A program that reads bytes, and where it comes from."""

    command: str
    parse: Callable[[str], PValues]
    install: str


class Run(NamedTuple):
    """A battery on a stream."""

    battery: str
    stream: str
    seed: int = 0
    size: int | None = None
    """Bytes of the stream; None for as many as the battery reads."""

    @property
    def command(self) -> str:
        """The command, for a shell."""
        size = "" if self.size is None else f" --bytes {self.size}"
        stream = f"python benchmarks/stream.py {self.stream} --seed {self.seed}{size}"
        return f"{stream} | {BATTERIES[self.battery].command}"

    def log(self, logs: pathlib.Path) -> pathlib.Path:
        """Where its log is."""
        return logs / f"{self.battery},{self.stream},{self.seed}.log"

    def into(self, logs: pathlib.Path) -> str:
        """Runs the battery; the log begins with the command and has its name when it is whole."""
        battery = BATTERIES[self.battery]
        program = battery.command.split()[0]
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed. {battery.install}.")
        logs.mkdir(parents=True, exist_ok=True)
        unfinished = self.log(logs).with_suffix(".running")
        with unfinished.open("w") as log:
            log.write(f"$ {self.command}\n")
            log.flush()
            command = self.command.replace("python", shlex.quote(sys.executable), 1)
            subprocess.run(
                ["bash", "-c", command], cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT
            )
        return unfinished.rename(self.log(logs)).read_text(errors="replace")


# --- batteries ----------------------------------------------------------------------------


def ent(log: str) -> PValues:
    """Of the four numbers that ent gives, which are normal but for the first."""
    fields = re.search(r"^1,(.*)$", log, re.MULTILINE)
    if fields:
        size, _, chi_squared, mean, pi, serial = map(float, fields[1].split(","))
        yield "bytes", two_sided(stats.chi2.sf(chi_squared, 255))
        yield "mean", two_sided(stats.norm.sf((mean - 127.5) / (5461.25 / size) ** 0.5))
        inside = math.pi / 4
        spread = 4 * (inside * (1 - inside) / (size // 6)) ** 0.5  # six bytes a point
        yield "Monte Carlo pi", two_sided(stats.norm.sf((pi - math.pi) / spread))
        yield "serial correlation", two_sided(stats.norm.sf(serial * size**0.5))


def dieharder(log: str) -> PValues:
    """One-sided: dieharder's Kolmogorov-Smirnov p-values are inaccurate near 1."""
    pattern = r"^ *(\w+)\| *(\d+)\| *\d+\| *\d+\|([\d.]+)\|"
    for name, number, p_value in re.findall(pattern, log, re.MULTILINE):
        yield f"{name} {number}", float(p_value)


def practrand(log: str) -> PValues:
    length = ""
    for line in log.splitlines():
        if line.startswith("length="):
            length = amount(line)
        found = re.search(r"^ +(\S+) +R.*p *[=~]+ *(1-)?([\d.e-]+)", line)
        if found:
            yield f"{found[1]}, {length}", two_sided(float(found[3]), bool(found[2]))


def testu01(log: str) -> PValues:
    name = ""
    for line in log.splitlines():
        name = re.sub(r" (test|calling).*", "", line) if re.match(r"\w+_\w+ test", line) else name
        found = re.match(r"p-value of test +: *(1 *- *)?(\S+)", line)
        if found:
            p_value = {"eps": 1e-300, "eps1": 1e-15}.get(found[2]) or float(found[2])
            yield name, two_sided(p_value, bool(found[1]))


_DEBIAN = "apt install dieharder ent"
_PRACTRAND = "RNG_test is part of PractRand, https://pracrand.sourceforge.net"
_TESTU01 = "benchmarks/testu01_stdin.c says how to compile it with TestU01"
_RNG_TEST = "RNG_test stdin32 -a -tlmin 1MB -tlmax"
BATTERIES = {
    "ent": Battery("ent -t", ent, _DEBIAN),
    "smallcrush": Battery("testu01_stdin SmallCrush", testu01, _TESTU01),
    "smallcrush-reversed": Battery("testu01_stdin SmallCrush reversed", testu01, _TESTU01),
    "dieharder-short": Battery("dieharder -g 200 -d 8", dieharder, _DEBIAN),
    "practrand-short": Battery(f"{_RNG_TEST} 64MB", practrand, _PRACTRAND),
    "practrand": Battery(f"{_RNG_TEST} 1GB", practrand, _PRACTRAND),
    "dieharder": Battery("dieharder -g 200 -a", dieharder, _DEBIAN),
    "practrand-long": Battery(
        "RNG_test stdin32 -a -tlmin 64MB -tf 1 -tlmax 256GB", practrand, _PRACTRAND
    ),
    "dieharder-serial": Battery("dieharder -g 200 -d 102", dieharder, _DEBIAN),
    "dieharder-serial-4": Battery("dieharder -g 200 -d 102 -p 400", dieharder, _DEBIAN),
    "crush": Battery("testu01_stdin Crush", testu01, _TESTU01),
} | {
    f"bigcrush-{part + 1}": Battery(
        f"testu01_stdin BigCrush {1 + part * 106 // 8} {(part + 1) * 106 // 8}", testu01, _TESTU01
    )
    for part in range(8)
}

FAST = ("rows", "columns", "fold_in", "seeds", "steps", "sites", "strata", "uniforms")
LAWS = (*FAST, "subsets")
WEAK = ("5-rounds", "reused", "counter")
ROUNDS = tuple(f"{rounds}-rounds" for rounds in range(6, 14))
PLAN = [
    *(Run("ent", name, size=100_000_000) for name in (*FAST, *WEAK)),
    Run("ent", "subsets", size=20_000_000),
    *(Run("smallcrush", name) for name in (*WEAK, *FAST)),
    *(Run("practrand", name) for name in (*WEAK, *FAST)),
    *(Run("practrand-short", name) for name in (*ROUNDS, "subsets")),
    Run("smallcrush-reversed", "rows"),
    Run("dieharder", "rows"),
    Run("practrand-long", "rows"),
    Run("crush", "rows"),
    *(Run(f"bigcrush-{part}", "rows") for part in range(1, 9)),
]


# --- the table ----------------------------------------------------------------------------


class Summary(NamedTuple):
    """What the p-values of a log say together."""

    count: int
    least: float
    """The smallest one."""
    name: str
    """Its test."""

    @property
    def corrected(self) -> float:
        """A bound on how probable it is that a perfect generator has one as small (Bonferroni)."""
        return min(1.0, self.count * self.least)

    @property
    def verdict(self) -> str:
        """A suspicious run is repeated, with another key and four times the data."""
        return (
            "fails"
            if self.corrected < 1e-9
            else "suspicious"
            if self.corrected < 1e-3
            else "passes"
        )


def summary(battery: str, log: str) -> Summary | None:
    found = [(p_value, name) for name, p_value in BATTERIES[battery].parse(log)]
    return Summary(len(found), *min(found)) if found else None


def amount(log: str) -> str:
    lengths = re.findall(r"^length= (\d+) ([kmgt])", log, re.MULTILINE)
    written = re.search(r"^(\d+) bytes (written|read)", log, re.MULTILINE)
    if lengths:
        return f"{lengths[-1][0]} {lengths[-1][1].upper()}iB"
    return f"{int(written[1]) / 1e6:,.0f} MB" if written else "-"


def table(logs: pathlib.Path) -> str:
    """All logs as Markdown."""
    lines, commands, total, least = [], [], 0, 1.0
    for path in sorted(logs.glob("*.log"), key=order):
        battery, stream, seed = path.stem.split(",")
        log = path.read_text(errors="replace")
        found = summary(battery, log)
        if found is None:
            continue
        if stream in LAWS:
            total, least = total + found.count, min(least, found.least)
        stopped = "" if re.search("bytes (written|read)", log) else ", stopped"
        cells = (
            stream if seed == "0" else f"{stream}, seed {seed}",
            battery,
            amount(log) + stopped,
            str(found.count),
            f"{found.least:.1e}" if found.least > 1e-299 else "0",
            found.name,
            f"{found.corrected:.1g}",
            found.verdict if found.verdict == "passes" else f"**{found.verdict}**",
        )
        lines.append("| " + " | ".join(cells) + " |")
        commands.append(log.partition("\n")[0].removeprefix("$ "))
    together = (
        f"The laws' streams have {total} p-values here, the smallest of which is {least:.1e}; "
        f"the smallest of as many independent ones is {1 / (total + 1):.1e} on average."
    )
    header = HEADER.format(
        date=datetime.date.today(), jax=importlib.metadata.version("jax"), together=together
    )
    return header + "\n".join(lines) + COMMANDS + "\n".join(commands) + "\n```\n"


def order(path: pathlib.Path) -> tuple[bool, int, int]:
    """By battery, and flaws last."""
    battery, stream, _ = path.stem.split(",")
    names = [*LAWS, *WEAK, *ROUNDS]
    return stream not in LAWS, [*BATTERIES].index(battery), names.index(stream)


HEADER = """# Batteries of tests

`python benchmarks/randomness.py`, {date}, JAX {jax}

A p-value here is two-sided: twice the probability of a result as low, or as high, whichever is
less. (dieharder's are as it gives them; docs/randomness.md tells why.) Corrected is the smallest
one, multiplied by the number of p-values of the run: a bound on the probability that a perfect
generator has one as small. A run passes from 0.001 on and fails below 1e-9; between them it is
suspicious, and repeated with another key and four times the data. PractRand's p-values are those of
all powers of two from the first to the amount given.
{together}

| stream | battery | data | p-values | smallest | test | corrected | verdict |
|---|---|---|---|---|---|---|---|
"""

COMMANDS = """

## Commands

```sh
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=BATTERIES, help="a battery")
    parser.add_argument("--stream", action="append", help="a stream; default: those of PLAN")
    parser.add_argument("--seed", type=int, default=0, help="seed of the keys")
    parser.add_argument("--table", action="store_true", help="run nothing, read the logs")
    parser.add_argument("--logs", type=pathlib.Path, default=HERE.parent / "output" / "randomness")
    arguments = parser.parse_args()
    planned = [
        run._replace(seed=arguments.seed)
        for run in PLAN
        if run.battery in (arguments.only or BATTERIES)
        and run.stream in (arguments.stream or [run.stream])
    ]
    for run in [] if arguments.table else planned:
        if not run.log(arguments.logs).exists():
            run.into(arguments.logs)
    RESULT.write_text(table(arguments.logs))


if __name__ == "__main__":
    main()
