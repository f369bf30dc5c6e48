"""Plants faults into the training steps of the examples, and measures what a recording costs.

    python benchmarks/first_difference.py            # about 20 minutes on two cores
    python benchmarks/first_difference.py --quick    # few faults, few rounds, as a trial

A fault is one bit, or one unit in the last place, of one element of one value: an argument, an
operation, an iteration of a loop, a gradient, the shard of one device. The faulty program is
recorded and compared with the sound one; the fault is located if the first difference is exactly
this value, with its iteration and device.
"""

import argparse
import collections
import functools
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # before JAX starts
# At the end: examples/ has an uncertainty.py too, and the one here is meant.
sys.path += [str(pathlib.Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import train_charlm
import train_cnn
import train_mlp
import train_resume
import train_transformer
from common import temporary_bytes
from flax import nnx
from harness import FULL, QUICK, Plan, Row, timed_row
from jax.sharding import PartitionSpec as P
from planted import Planted, located
from rich import box
from rich.console import Console
from run import RESULTS, describe_environment, table

import jdropout
from jdropout.testing import Recording, _probes, _recording, _tracing, first_difference

SEED = 20140614
MAX_ITERATIONS = 16


class Step(NamedTuple):
    """A training step."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few faults and rounds, as a trial")
    parser.add_argument("--only", action="append", default=[], choices=STEPS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    environment = describe_environment(time.strftime("%Y-%m-%d"))
    console = Console(width=170, record=True, highlight=False)
    console.print(*(f"- {name}: {value}" for name, value in environment.items()), sep="\n")
    steps = {name: STEPS[name]() for name in options.only or STEPS}
    for section in (faults, cost):
        console.print(f"\n## {section.__name__}\n\n{section.__doc__}\n")
        console.print(table(list(section(steps, options.quick)), box.MARKDOWN))
    name = f"{environment['device'].replace(' ', '-')}-jax{environment['jax']}-first-difference"
    text = console.export_text()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}{'-quick' if options.quick else ''}.md"
    path.write_text(f"# Faults located by their first difference\n\n{text}")


# --- the steps ----------------------------------------------------------------------------


def mlp(api: str) -> Step:
    options = options_of(
        train_mlp, "--api", api, "--width", "16", "--train-size", "64", "--batch-size", "16"
    )
    return of_run(options, train_mlp.make_training(options, options.rate))


def cnn() -> Step:
    options = options_of(
        train_cnn, "--width", "4", "--depth", "2", "--train-size", "64", "--batch-size", "8"
    )
    return of_run(options, train_cnn.make_training(options, train_cnn.KINDS))


def of_run(options: argparse.Namespace, training: train_mlp.Training) -> Step:
    options.seeds = 1
    runs = train_mlp.start(options, training)
    run = jax.tree.map(lambda x: x[0], runs)
    return Step(functools.partial(train_mlp.train_step, training), (jnp.int32(3), run))


def charlm() -> Step:
    options = options_of(
        train_charlm, "--width", "8", "--context", "8", "--batch-size", "4", *SMALL_TEXT
    )
    text = train_transformer.load_text(options.train_chars)
    model = train_charlm.CharLM(
        1, options.width, dict.fromkeys(train_charlm.KINDS, 0.2), nnx.Rngs(0)
    )
    structure, params, streams = nnx.split(model, nnx.Param, ...)
    optimizer = train_transformer.make_optimizer(options)
    training = train_charlm.Training(
        structure, streams, optimizer, options.batch_size, options.context
    )
    state = train_transformer.State(params, optimizer.init(params))
    arguments = (state, jnp.asarray(text.train), jax.random.key(0), jnp.int32(3))
    return Step(functools.partial(train_charlm.train_step, training), arguments)


def transformer() -> Step:
    options = options_of(
        train_transformer,
        *("--width", "8", "--heads", "2", "--layers", "1", "--context", "8"),
        *("--batch-size", "2", *SMALL_TEXT),
    )
    text = train_transformer.load_text(options.train_chars)
    structure = train_transformer.structure(options, options.rate)
    params = nnx.state(train_transformer.Transformer(options, options.rate, nnx.Rngs(0)))
    optimizer = train_transformer.make_optimizer(options)
    training = train_transformer.Training(structure, optimizer, options.batch_size, options.context)
    state = train_transformer.State(params, optimizer.init(params))
    arguments = (state, jnp.asarray(text.train), jax.random.key(0), jnp.int32(3))
    return Step(functools.partial(train_transformer.train_step, training), arguments)


def resume() -> Step:
    options = options_of(
        train_resume,
        *("--width", "16", "--train-size", "64", "--batch-size", "32", "--microbatches", "4"),
    )
    training = train_resume.make_training(options)
    data, start = train_resume.make_data_and_start(options, training)
    state = train_resume.on_all_devices(training, start)
    return Step(functools.partial(train_resume.train_step, training), (data.train, state))


def sharded() -> Step:
    """A step of data-parallel training: two microbatches on each of eight devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    random = np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.standard_normal(shape, np.float32)) / 4
        for name, shape in {"hidden": (64, 16), "output": (16, 10)}.items()
    }

    def loss(params: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        start = (jax.lax.axis_index("data") * len(images), 0)
        hidden = jax.nn.relu(images @ params["hidden"])
        hidden = jdropout.dropout(key, hidden, 0.5, start=start, global_shape=(4 * len(images), 16))
        return train_mlp.cross_entropy(hidden @ params["output"], labels)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P(None, "data"), P(None, "data")),
        out_specs=P(),
    )
    def gradient(params: Any, keys: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        def add(total: Any, batch: Any) -> Any:
            mine = jax.grad(loss)(params, *batch)
            return jax.tree.map(jnp.add, total, mine), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (keys, images, labels))[0]

    def step(params: Any, key: jax.Array, samples: _digits.Samples) -> Any:
        keys = jax.random.split(key, 2)
        split = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), samples)
        summed = gradient(params, keys, *split)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, summed)

    pool, _ = _digits.load()
    samples = jax.tree.map(lambda x: x[:32], pool)
    return Step(step, (params, jax.random.key(0), samples))


STEPS: dict[str, Callable[[], Step]] = {
    "train_mlp (nnx)": functools.partial(mlp, "nnx"),
    "train_mlp (linen)": functools.partial(mlp, "linen"),
    "train_cnn": cnn,
    "train_charlm": charlm,
    "train_transformer": transformer,
    "train_resume, 8 devices": resume,
    "shard_map, 8 devices": sharded,
}
SMALL_TEXT = ("--train-chars", "1000", "--steps", "100")


def options_of(example: Any, *arguments: str) -> argparse.Namespace:
    """The options of an example with these arguments."""
    before = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["example", *arguments, "--output", folder]
        try:
            return example.parse_options()
        finally:
            sys.argv = before


# --- the sections -------------------------------------------------------------------------


def faults(steps: dict[str, Step], quick: bool) -> Iterator[Row]:
    """Faults by step and kind: how many were located exactly, of how many."""
    count = 6 if quick else 40
    for name, step in steps.items():
        planted = Planted(step.function, *step.arguments, max_iterations=MAX_ITERATIONS)
        generator = random.Random(SEED)
        hits: collections.Counter[str] = collections.Counter()
        tries: collections.Counter[str] = collections.Counter()
        rows = choose_rows(planted, generator, count)
        planted.prepare(rows)
        for row in rows:
            fault, kind = planted.choose(generator, row)
            difference = first_difference(planted.clean, planted.record(fault))
            tries[kind] += 1
            hits[kind] += located(planted, row, difference)
            if not located(planted, row, difference):
                print(f"missed: {name}, {kind}, {planted.spots[row]}\n{difference}")
        for kind in sorted(tries):
            cells = {"located": str(hits[kind]), "missed": str(tries[kind] - hits[kind])}
            yield Row({"step": name, "fault": kind}, cells, {})
        print(f"{name}: {hits.total()} of {tries.total()} located", file=sys.stderr, flush=True)
        cells = {"located": str(hits.total()), "missed": str(tries.total() - hits.total())}
        yield Row({"step": name, "fault": "all"}, cells, {})


def choose_rows(planted: Planted, generator: random.Random, count: int) -> list[int]:
    """Rows of a quarter of arguments, and of equations that are equally likely, loop or not."""
    rows: dict[Any, list[int]] = collections.defaultdict(list)
    for row, spot in planted.spots.items():
        rows[spot.equation.number if spot.equation else "input"].append(row)
    inputs = rows.pop("input")
    chosen = [generator.choice(inputs) for _ in range(count // 8)]
    equations = list(rows)
    chosen += [generator.choice(rows[generator.choice(equations)]) for _ in range(count // 2)]
    inside = [number for number in equations if len(planted.spots[rows[number][0]].inside)]
    backward = [
        number for number in equations if planted.spots[rows[number][0]].equation.source.backward
    ]
    for numbers in (inside or equations, backward or equations):
        some = (count - count // 8 - count // 2 + 1) // 2
        chosen += [generator.choice(rows[generator.choice(numbers)]) for _ in range(some)]
    return chosen[:count]


def cost(steps: dict[str, Step], quick: bool) -> Iterator[Row]:
    """A recording over the plain step, both compiled: time, temporaries and compilation; the file;
    and how many of the step's results have other bits when they are recorded.
    """
    plan: Plan = QUICK if quick else FULL
    for name, step in steps.items():
        traced = _tracing.trace(step.function, step.arguments, MAX_ITERATIONS)
        flat = jax.jit(lambda c, x, t=traced: jax.core.eval_jaxpr(t.closed.jaxpr, c, *x))
        probed = jax.jit(_probes.probe(traced.closed, traced.program, False))
        arguments = (traced.closed.consts, traced.leaves)
        programs, seconds = {}, {}
        for which, function, own in (
            ("plain", flat, arguments),
            ("recorded", probed, (True, *arguments)),
        ):
            lowered = function.lower(*own)
            begin = time.perf_counter()
            programs[which] = lowered.compile()
            seconds[which] = time.perf_counter() - begin
        calls = {
            "plain": functools.partial(programs["plain"], *arguments),
            "recorded": functools.partial(programs["recorded"], True, *arguments),
        }
        column = "recorded / plain"
        row = timed_row({"step": name}, calls, (column,), plan)
        sizes = temporary_bytes(programs)
        recorded, rows, _ = calls["recorded"]()
        results = [jax.tree.leaves(calls["plain"]()), recorded]
        pairs = [tuple(map(bits, pair)) for pair in zip(*results, strict=True)]
        changed = sum(not np.array_equal(*pair) for pair in pairs)
        cells = {
            "equations": str(traced.program.equations),
            "fingerprints": str(np.count_nonzero(_recording.as_64_bits(rows))),
            "time": row.cells[column],
            "temporaries": f"{sizes['recorded'] / max(1, sizes['plain']):.2f}",
            "compilation": f"{seconds['recorded'] / seconds['plain']:.1f}",
            "seconds to compile": f"{seconds['recorded']:.1f}",
            "file": f"{file_size(traced.program, rows):,} B",
            "results with other bits": f"{changed} of {len(pairs)}",
        }
        yield Row(row.labels, cells, row.details | {"bytes": sizes, "compile": seconds})


def bits(x: jax.Array) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.frombuffer(np.asarray(x).tobytes(), np.uint8)


def file_size(program: Any, rows: jax.Array) -> int:
    recording = Recording(program, _recording.as_64_bits(rows), _recording.about(), [])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "step.rec"
        recording.save(path)
        return path.stat().st_size


if __name__ == "__main__":
    main()
