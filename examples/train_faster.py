"""Trains a vision transformer on handwritten digits, with dropout that saves time.

Stochastic depth regularizes deep residual networks, but costs time: `drop_path` computes the branch
of every example, and then drops some. `StochasticDepth` computes the kept examples only, so a step
at rate 0.4 takes little more than 0.6 of the time. `RouteTokens` sends the dropped patches around
the inner blocks. All networks start from the same parameters and see the same batches; they are
trained in turns, so that they find the machine equally busy.

    python examples/train_faster.py
    python examples/train_faster.py --rate 0.25 --depth 8 --seeds 1

The table shows how long each of them trains until it reaches an accuracy on the test images, and
the figure shows the accuracy over time. Times differ from machine to machine; the digest in the
last line does not: all randomness derives from the seed and the step number.
"""

import argparse
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jdropout.keys import at_site, site_key
from jdropout.nnx import DropPath, RouteTokens, StochasticDepth, set_site_keys

SIDE, PATCH = 8, 2
TARGETS = (0.9, 0.95, 0.97)
EVALUATIONS = 40
KINDS = ("no dropout", "drop_path", "StochasticDepth", "RouteTokens")


def main() -> None:
    options = parse_options()
    histories = train(options)
    Console().print(results_table(histories, describe(options)))
    path = options.output / "train_faster.png"
    save_curves(path, histories, describe(options))
    print(f"accuracy over time: {path}")
    last = [run.params for runs in histories.values() for run in runs]
    print(f"digest: {train_mlp.digest(last)}")


# --- model --------------------------------------------------------------------------------


class ViT(nnx.Module):
    """Patches with positions, a class token, residual blocks, and logits."""

    def __init__(self, options: argparse.Namespace, kind: str, rngs: nnx.Rngs):
        width = options.width
        count = (SIDE // PATCH) ** 2
        initial = nnx.initializers.normal(0.5)
        self.patches = nnx.Linear(PATCH * PATCH, width, rngs=rngs)
        self.positions = nnx.Param(initial(rngs.params(), (count + 1, width)))
        self.blocks = nnx.Sequential(*(Block(options, kind, rngs) for _ in range(options.depth)))
        if kind == "RouteTokens":
            first, *inner, last = self.blocks.layers
            routed = RouteTokens(
                nnx.Sequential(*inner), options.rate, num_prefix_tokens=1, rngs=rngs
            )
            self.blocks = nnx.Sequential(first, routed, last)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, _digits.CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, 64) to the logits of the classes."""
        grid = images.reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        patches = jnp.swapaxes(grid, 2, 3).reshape(len(images), -1, PATCH * PATCH)
        x = jnp.pad(self.patches(patches), ((0, 0), (1, 0), (0, 0))) + self.positions[...]
        return self.logits(self.norm(self.blocks(x)[:, 0]))


class Block(nnx.Module):
    """Attention and an MLP, each on a residual branch."""

    def __init__(self, options: argparse.Namespace, kind: str, rngs: nnx.Rngs):
        width = options.width
        attention = nnx.Sequential(
            nnx.LayerNorm(width, rngs=rngs),
            nnx.MultiHeadAttention(options.heads, width, decode=False, rngs=rngs),
        )
        mlp = nnx.Sequential(
            nnx.LayerNorm(width, rngs=rngs),
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(4 * width, width, rngs=rngs),
        )
        self.branches = nnx.List(
            StochasticDepth(branch, options.rate, rngs=rngs)
            if kind == "StochasticDepth"
            else Residual(branch, options.rate if kind == "drop_path" else 0.0, rngs)
            for branch in (attention, mlp)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array like `x`."""
        for branch in self.branches:
            x = branch(x)
        return x


class Residual(nnx.Module):
    """A residual branch that is computed for all examples, and then dropped for some."""

    def __init__(self, branch: nnx.Module, rate: float, rngs: nnx.Rngs):
        self.branch = branch
        self.drop_path = DropPath(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array like `x`."""
        return x + self.drop_path(self.branch(x))


# --- training -----------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that the steps change."""

    params: nnx.State
    optimizer_state: optax.OptState


class Run:
    """A training run: its compiled functions, its state and its history."""

    def __init__(self, options: argparse.Namespace, kind: str, seed: int, data: _digits.Data):
        self.root = jax.random.key(seed)
        self.data = data
        rates = optax.warmup_cosine_decay_schedule(
            0.0, options.learning_rate, options.steps // 8, options.steps
        )
        self.optimizer = optax.adamw(rates)
        self.batch_size = options.batch_size
        model = ViT(options, kind, nnx.Rngs(at_site(self.root, "init")))
        self.structure, self.params, self.streams = nnx.split(model, nnx.Param, ...)
        self.state = State(self.params, self.optimizer.init(self.params))
        step = jax.jit(self.train_step, donate_argnums=0)
        self.step = step.lower(self.state, np.int32(0)).compile()
        self.score = jax.jit(self.accuracy).lower(self.params).compile()
        self.seconds: list[float] = []
        self.accuracies: list[float] = []

    def train_step(self, state: State, step: jax.Array) -> State:
        """Runs one step. Its randomness depends only on the root key and the step."""
        images, labels = self.data.train
        batch_key = site_key(self.root, step=step, site="batch")
        rows = jax.random.randint(batch_key, (self.batch_size,), 0, len(labels))

        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(self.structure, params, self.streams, copy=True)
            set_site_keys(model, self.root, step=step)
            return train_mlp.cross_entropy(model(images[rows]), labels[rows])

        gradient = jax.grad(loss)(state.params)
        updates, optimizer_state = self.optimizer.update(
            gradient, state.optimizer_state, state.params
        )
        return State(optax.apply_updates(state.params, updates), optimizer_state)

    def accuracy(self, params: nnx.State) -> jax.Array:
        """Returns the accuracy on the test images, with all of the network."""
        model = nnx.merge(self.structure, params, self.streams, copy=True)
        images, labels = self.data.test
        logits = nnx.view(model, deterministic=True)(images)
        return (logits.argmax(axis=-1) == labels).mean()

    def advance(self, first: int, last: int) -> None:
        """Runs the steps first, ..., last - 1 and evaluates; only the steps are timed."""
        begin = time.perf_counter()
        for step in range(first, last):
            self.state = self.step(self.state, np.int32(step))
        jax.block_until_ready(self.state)
        before = self.seconds[-1] if self.seconds else 0.0
        self.seconds.append(before + time.perf_counter() - begin)
        self.params = self.state.params
        self.accuracies.append(float(self.score(self.params)))


def train(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Trains all runs in turns; returns them by kind."""
    pool, test = _digits.load()
    bar_console = Console(stderr=True)
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        total = options.steps * options.seeds * len(KINDS)
        bar = progress.add_task("training", total=total)
        for seed in range(options.seed, options.seed + options.seeds):
            key = at_site(jax.random.key(seed), "data")
            data = _digits.draw(key, pool, test, options.train_size, options.label_noise)
            group = {kind: Run(options, kind, seed, data) for kind in KINDS}
            first = 0
            for last in train_mlp.evaluation_steps(options.steps, EVALUATIONS):
                for run in group.values():
                    run.advance(first, last)
                    progress.advance(bar, last - first)
                first = last
            for kind, run in group.items():
                runs[kind].append(run)
    return runs


# --- results ------------------------------------------------------------------------------


def results_table(runs: Mapping[str, Sequence[Run]], caption: str) -> Table:
    """Makes a table of the seconds until the mean accuracy reaches each target."""
    columns = [f"seconds to {target:.0%}" for target in TARGETS]
    table = Table(caption=caption)
    table.add_column(no_wrap=True)
    for column in ("time of a step", *columns, "accuracy at the end"):
        table.add_column(column)
    step = mean_seconds(runs[KINDS[0]])[-1]
    for kind, group in runs.items():
        seconds, accuracy = mean_seconds(group), mean_accuracies(group)
        reached = [np.flatnonzero(accuracy >= target) for target in TARGETS]
        table.add_row(
            kind,
            f"{seconds[-1] / step:.2f}",
            *(f"{seconds[at[0]]:.1f}" if at.size else "-" for at in reached),
            f"{accuracy[-1]:.1%}",
        )
    return table


def mean_seconds(runs: Sequence[Run]) -> np.ndarray:
    return np.mean([run.seconds for run in runs], axis=0)


def mean_accuracies(runs: Sequence[Run]) -> np.ndarray:
    return np.mean([run.accuracies for run in runs], axis=0)


def save_curves(path: pathlib.Path, runs: Mapping[str, Sequence[Run]], title: str) -> None:
    """Draws the accuracy over the time of training."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    lines = zip(_digits.COLOURS, _digits.DASHES, runs.items(), strict=False)
    for colour, dashes, (kind, group) in lines:
        seconds, accuracy = mean_seconds(group), mean_accuracies(group)
        label = f"{kind}: {accuracy[-1]:.1%} after {seconds[-1]:.0f} s"
        axes.plot(seconds, accuracy, linestyle=dashes, color=colour, linewidth=2, label=label)
        axes.plot(seconds[-1], accuracy[-1], "o", color=colour)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("accuracy on the test images")
    axes.set_ylim(0.8, 1)
    axes.set_yticks(np.linspace(0.8, 1, 5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=110)


def describe(options: argparse.Namespace) -> str:
    noise = options.label_noise
    wrong = f", {100 * noise:g}% of the labels wrong" if noise else ""
    return (
        f"{options.train_size} training images{wrong}; "
        f"{options.depth} blocks of width {options.width}\n"
        f"rate {options.rate:g}, {options.steps} steps; mean of {options.seeds} runs"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a vision transformer on digits, with dropout that saves time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    train_mlp.add_training_options(add)
    positive = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    depth = checked(int, lambda n: n >= 3, "a whole number of at least 3")
    add("--seeds", type=positive, default=2, help="number of runs of each kind")
    add("--depth", type=depth, default=6, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads")
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("output"),
        help="directory for the figure",
    )
    parser.set_defaults(
        rate=0.4, width=128, steps=400, batch_size=64, train_size=1000, label_noise=0.0
    )
    options = parse_and_make_output(parser)
    if options.width % options.heads:
        parser.error(
            f"argument --heads: got {options.heads}, pass a divisor of --width {options.width}"
        )
    return options


if __name__ == "__main__":
    main()
