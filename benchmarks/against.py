"""Times this checkout against another one of the same project, in one process.

    git worktree add /tmp/before v0.1.0
    python benchmarks/against.py /tmp/before

The other checkout's package is imported under another name. Ratios are now / before.
"""

import argparse
import functools
import importlib
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from common import KEY, normal
from harness import FULL, QUICK, Plan, Row, interleave, ratio_row, timed_row
from rich import box
from rich.console import Console
from run import RESULTS, describe_environment, table

import jdropout

COLUMNS = ("now / before",)
Function = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=pathlib.Path, help="the other checkout")
    parser.add_argument("--quick", action="store_true", help="few rounds, as a trial")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    libraries = {"now": jdropout, "before": imported(options.checkout / "jdropout")}
    plan = QUICK if options.quick else FULL

    environment = describe_environment(time.strftime("%Y-%m-%d"))
    environment["command"] = "python benchmarks/against.py OTHER_CHECKOUT"
    console = Console(width=120, record=True, highlight=False)
    console.print(*(f"- {name}: {value}" for name, value in environment.items()), sep="\n")
    for section in (eager, jitted, compiled):
        console.print(f"\n## {section.__name__}\n\n{section.__doc__}\n")
        console.print(table(list(section(libraries, plan)), box.MARKDOWN))
    name = f"{environment['device'].replace(' ', '-')}-jax{environment['jax']}-against.md"
    text = console.export_text()
    (options.output / name).write_text(f"# This checkout against another one\n\n{text}")


def imported(package: pathlib.Path) -> ModuleType:
    """The package under the name ``jdropout_before``."""
    folder = pathlib.Path(tempfile.mkdtemp())
    shutil.copytree(package, folder / "jdropout_before")
    for path in folder.rglob("*.py"):
        path.write_text(re.sub(r"\bjdropout\b(?!/)", "jdropout_before", path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module("jdropout_before")


def calls(library: ModuleType) -> dict[str, Function]:
    """Functions of (key, x, rate), by name."""
    return {
        "dropout": lambda key, x, rate: library.dropout(key, x, rate),
        "dropout, 32 bits": lambda key, x, rate: library.dropout(key, x, rate, precision=32),
        "keep_mask": lambda key, x, rate: library.keep_mask(key, rate, x.shape),
        "drop_path": lambda key, x, rate: library.drop_path(key, x, rate),
        "alpha_dropout": lambda key, x, rate: library.alpha_dropout(key, x, rate),
        "zoneout": lambda key, x, rate: library.zoneout(key, x, 2 * x, rate),
        "gaussian_noise": lambda key, x, rate: library.gaussian_noise(key, x, rate),
        "targeted_dropout": lambda key, x, rate: library.targeted_dropout(
            key, x, rate, target_fraction=0.5
        ),
    }


def eager(libraries: dict[str, ModuleType], plan: Plan) -> Iterator[Row]:
    """Calls outside jit, (32, 128), rate 0.1."""
    x = normal((32, 128))
    named = {name: calls(library) for name, library in libraries.items()}
    for call in calls(jdropout):
        functions = {name: functools.partial(named[name][call], KEY, x, 0.1) for name in libraries}
        yield timed_row({"call": call}, functions, COLUMNS, plan)
    functions = {
        name: functools.partial(library.dropout, None, x, 0.1, deterministic=True)
        for name, library in libraries.items()
    }
    yield timed_row({"call": "dropout, deterministic"}, functions, COLUMNS, plan)


def jitted(libraries: dict[str, ModuleType], plan: Plan) -> Iterator[Row]:
    """Both passes under jit, at a static and at a traced rate."""
    named = {name: calls(library) for name, library in libraries.items()}
    for shape in ((1024, 784), (4096, 4096)):
        x = normal(shape)
        for call in ("dropout", "alpha_dropout", "zoneout", "gaussian_noise"):
            for rate in (0.1, jnp.float32(0.1)):

                def gradient(key: Any, x: Any, rate: Any, function: Function) -> Any:
                    return jax.grad(lambda x: jnp.square(function(key, x, rate)).sum())(x)

                traced = isinstance(rate, jax.Array)
                functions = {}
                for name in libraries:
                    step = functools.partial(gradient, function=named[name][call])
                    program = (
                        functools.partial(jax.jit(step), KEY, x, rate)
                        if traced
                        else functools.partial(jax.jit(functools.partial(step, rate=0.1)), KEY, x)
                    )
                    functions[name] = program
                labels = {"call": call, "shape": str(shape), "rate": "traced" if traced else "0.1"}
                yield timed_row(labels, functions, COLUMNS, plan)


def compiled(libraries: dict[str, ModuleType], plan: Plan) -> Iterator[Row]:
    """The gradient of layers of tanh(x @ w) and a function: to compile, and to run."""
    arguments = (0.05 * normal((512, 512)), normal((256, 512)), KEY)
    for call, layers in (("dropout", plan.layers), ("gaussian_noise", 8), ("zoneout", 8)):
        steps: dict[str, Any] = {}

        def loss(w: Any, x: Any, key: Any, function: Function, layers: int) -> Any:
            for index in range(layers):
                x = function(jax.random.fold_in(key, index), jnp.tanh(x @ w), 0.1)
            return x.sum()

        def compile_step(name: str, call: str, layers: int, steps: dict[str, Any]) -> float:
            jax.clear_caches()
            function = calls(libraries[name])[call]
            step = jax.grad(functools.partial(loss, function=function, layers=layers))
            start = time.process_time()
            steps[name] = jax.jit(step).lower(*arguments).compile()
            return time.process_time() - start

        samplers = {
            name: functools.partial(compile_step, name, call, layers, steps) for name in libraries
        }
        interleave(samplers, 1)  # starts the compiler's threads
        labels = {"layers": f"{layers} of {call}"}
        times = interleave(samplers, plan.few_rounds)
        yield ratio_row(labels | {"quantity": "compile, CPU time"}, times, COLUMNS)
        functions = {name: functools.partial(step, *arguments) for name, step in steps.items()}
        yield timed_row(labels | {"quantity": "step"}, functions, COLUMNS, plan)


if __name__ == "__main__":
    main()
