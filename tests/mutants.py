"""Small faults that tests must see: `python tests/mutants.py [NAMES...] [--jobs N] [--list]`.

Each mutant in `mutants.toml` is one edit of the package, and the few tests that should fail with
it. These tests are run on the package as it is, and then for every mutant on a copy that has its
edit. The result is a Markdown table; the exit status is 1 if a mutant survives. A directory in
`JAX_COMPILATION_CACHE_DIR` makes a second run faster.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 300
"""A mutant that takes longer counts as seen."""

# Every run is a fork of one process that has imported what takes long, but not the package.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "jax", "jax.experimental.pallas", "flax.linen", "flax.nnx", "scipy.stats"]


class Mutant(NamedTuple):
    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: list[str]

    def occurrences(self) -> int:
        return (ROOT / "jdropout" / self.file).read_text().count(self.old)

    def apply(self, root: pathlib.Path) -> None:
        path = root / "jdropout" / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


class Result(NamedTuple):
    verdict: str
    reason: str
    seconds: float


def run(tests: list[str], mutant: Mutant | None = None) -> Result:
    """Runs tests on a copy of the package, with the edit of a mutant."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name in ("jdropout", "ports", "tests"):
            shutil.copytree(ROOT / name, root / name)
        shutil.copy(ROOT / "pyproject.toml", root)
        if mutant is not None:
            mutant.apply(root)
        process = FORKS.Process(target=run_here, args=(root, tests))
        process.start()
        process.join(SECONDS if mutant else None)
        verdict = {0: "SURVIVED", 1: "killed", None: "killed"}.get(process.exitcode, "NOT RUN")
        process.kill()
        lines = (root / "output").read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    result = Result(verdict, " ".join(failed), time.monotonic() - start)
    name = mutant.name if mutant else "(no mutant)"
    print(
        f"{name}: {verdict}, {result.seconds:.1f} s, {result.reason}", file=sys.stderr, flush=True
    )
    return result


def run_here(root: pathlib.Path, tests: list[str]) -> None:
    """In the fork: exits as pytest does."""
    import pytest

    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)  # for tests that start a process
    sys.path.insert(0, str(root))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    with open("output", "w") as output, contextlib.redirect_stdout(output):
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="how the names of the mutants to run begin")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="run nothing, but count the edits")
    options = parser.parse_args()
    table = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
    mutants = [
        Mutant(name, **fields)
        for name, fields in table.items()
        if name.startswith(tuple(options.names or [""]))
    ]
    for mutant in (stale := [mutant for mutant in mutants if mutant.occurrences() != 1]):
        print(f"{mutant.name}: {mutant.occurrences()} times in {mutant.file}", file=sys.stderr)
    if stale or not mutants:
        return 2
    if options.list:
        for file, count in collections.Counter(mutant.file for mutant in mutants).items():
            print(f"{count:3} {file}")
        print(f"{len(mutants):3} mutants")
        return 0

    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        FORKS.set_forkserver_preload(IMPORTED)
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        sharded = [test for test in tests if test.startswith("sharded/")]  # with eight devices
        for group in (sharded, [test for test in tests if test not in sharded]):
            if group and run(group).verdict != "SURVIVED":
                return 2
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda mutant: run(mutant.tests, mutant), mutants))

    print("| mutant | what it breaks | file | tests | result | s |")
    print("|---|---|---|---|---|---|")
    for mutant, result in zip(mutants, results, strict=True):
        seen_by = "<br>".join(f"`{test}`" for test in mutant.tests)
        cells = (mutant.name, mutant.breaks, f"`{mutant.file}`", seen_by, result.verdict)
        print("|", " | ".join(cells), f"| {result.seconds:.0f} |")
    killed = sum(result.verdict == "killed" for result in results)
    print(f"\n{killed} of {len(mutants)} mutants are killed.")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
