"""Active learning: chooses which images of digits to label, so that few labels suffice.

A network starts with two labelled images of each digit. In every round it is trained from scratch
on the labels so far, and then ten more images of the pool are labelled, either

* in random order, or
* those with the largest predictive entropy: the network is uncertain about them, or
* those with the largest mutual information (BALD): different masks give contradicting predictions.

The scores come from Monte Carlo dropout. Runs with the same seed share the order of the pool, the
first images, the initial parameters and, batch by batch, positions in the list of labelled images.

    python examples/active_learning.py
    python examples/active_learning.py --rate 0.25 --samples 100

All randomness derives from one key, the round and the step. The same command on the same machine
ends with the same labelled images and parameters, bit for bit; compare the digest in the last
line.
"""

import argparse
import functools
import pathlib
from typing import NamedTuple

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from train_cnn import with_error

import jdropout
from jdropout import uncertainty
from jdropout.keys import at_site

FIRST = 2 * _digits.CLASSES
MORE = 10
ACQUISITIONS = ("random", "entropy", "BALD")


def main() -> None:
    options = parse_options()
    counts = np.arange(FIRST, options.train_size + 1, MORE)
    accuracies, last = learn(options, counts)
    print_results(options, counts, accuracies)
    path = options.output / "active_learning.png"
    save_curves(path, counts, accuracies, describe(options))
    print(f"learning curves: {path}")
    print(f"digest: {train_mlp.digest(last)}")


class Run(NamedTuple):
    """A run and its state; or all runs, along two leading axes."""

    key: jax.Array
    acquisition: jax.Array
    """Index into ACQUISITIONS."""
    data: _digits.Data
    """Data of the run; its training samples are the pool."""
    rows: jax.Array
    """Indices of labelled images in the pool, padded with zeros."""


def learn(options: argparse.Namespace, counts: np.ndarray) -> tuple[np.ndarray, optax.Params]:
    """Returns test accuracies, with axes (acquisition, run, round), and the last parameters.

    All runs of all acquisitions are one call of one compiled function, which is the same in every
    round: the number of labels is an argument, and no shape depends on it.
    """
    network = train_mlp.nnx_network(options.width, options.rate)
    play_one = functools.partial(play, options, network)
    play_all = jax.jit(jax.vmap(jax.vmap(play_one, (0, None)), (0, None)))
    runs = start(options)
    history = []
    bar_console = Console(stderr=True)
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        for count in progress.track(counts, description="rounds of labelling"):
            rows, params, accuracy = play_all(runs, count)
            runs = runs._replace(rows=rows)
            history.append(jax.device_get(accuracy))
    return np.stack(history, axis=-1), params


def start(options: argparse.Namespace) -> Run:
    """Returns all runs, with axes (acquisition, run), each with its first labels."""
    pool, test = _digits.load()

    def start_one(key: jax.Array, acquisition: jax.Array) -> Run:
        # Shuffles and standardises the whole pool, which needs no labels.
        data_key, size = at_site(key, "data"), _digits.POOL_SIZE
        data = _digits.draw(data_key, pool, test, size, options.label_noise)
        is_digit = jax.nn.one_hot(data.train.labels, _digits.CLASSES, dtype=jnp.int32)
        earlier = ((is_digit.cumsum(axis=0) - 1) * is_digit).sum(axis=1)  # of the same digit
        (first,) = jnp.nonzero(earlier < FIRST // _digits.CLASSES, size=FIRST)
        rows = jnp.pad(first.astype(jnp.int32), (0, options.train_size + MORE - FIRST))
        return Run(key, acquisition, data, rows)

    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    start_all = jax.vmap(jax.vmap(start_one, (0, None)), (None, 0))
    return jax.jit(start_all)(keys, jnp.arange(len(ACQUISITIONS)))


def play(
    options: argparse.Namespace, network: train_mlp.Network, run: Run, count: jax.Array
) -> tuple[jax.Array, optax.Params, jax.Array]:
    """Plays a round: trains on the first `count` rows, tests, and appends the next rows."""
    key = at_site(jax.random.fold_in(run.key, count), "round")
    params = train(options, network, run, key, count)
    accuracy, _ = train_mlp.evaluate(network, params, run.data.test)
    labelled = jnp.arange(len(run.rows)) < count
    known = jnp.zeros(_digits.POOL_SIZE, bool).at[run.rows].max(labelled)
    scores = score(options, network, run, key, params)
    _, chosen = jax.lax.top_k(jnp.where(known, -jnp.inf, scores), MORE)
    rows = jax.lax.dynamic_update_slice(run.rows, chosen.astype(jnp.int32), (count,))
    return rows, params, accuracy


def train(
    options: argparse.Namespace,
    network: train_mlp.Network,
    run: Run,
    key: jax.Array,
    count: jax.Array,
) -> optax.Params:
    """Trains from scratch, on batches of the first `count` rows."""
    optimizer = optax.adam(options.learning_rate)

    def take_step(step: jax.Array, state: tuple) -> tuple:
        params, optimizer_state = state
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        rows = run.rows[jax.random.randint(batch_key, (options.batch_size,), 0, count)]
        images, labels = run.data.train.images[rows], run.data.train.labels[rows]

        def loss(params: optax.Params) -> jax.Array:
            return train_mlp.cross_entropy(network.apply(params, images, dropout_key), labels)

        updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state

    params = network.init(at_site(run.key, "init"))
    params, _ = jax.lax.fori_loop(0, options.steps, take_step, (params, optimizer.init(params)))
    return params


def score(
    options: argparse.Namespace,
    network: train_mlp.Network,
    run: Run,
    key: jax.Array,
    params: optax.Params,
) -> jax.Array:
    """Returns a score for each image of the pool: the largest are labelled next."""
    prediction = jdropout.mc_predict(
        lambda key, params, images: network.apply(params, images, key),
        at_site(key, "masks"),
        params,
        run.data.train.images,
        num_samples=options.samples,
        return_samples=True,
    )
    scores = {
        "random": jax.random.uniform(at_site(key, "order"), (_digits.POOL_SIZE,)),
        "entropy": uncertainty.predictive_entropy(prediction.samples),
        "BALD": uncertainty.mutual_information(prediction.samples),
    }
    return jnp.stack([scores[name] for name in ACQUISITIONS])[run.acquisition]


def print_results(options: argparse.Namespace, counts: np.ndarray, accuracies: np.ndarray) -> None:
    """Prints the scores of each acquisition, and the paired differences from random order."""
    reached = accuracies >= options.target / 100
    needed = np.where(reached.any(-1), counts[reached.argmax(-1)], counts[-1] + MORE)
    columns = {
        f"labels for {options.target:g}%": (needed, ".0f"),
        "mean accuracy, %": (100 * accuracies.mean(axis=-1), ".1f"),
        "at the end, %": (100 * accuracies[..., -1], ".1f"),
    }
    late = f"a run that does not get to {options.target:g}% counts as {counts[-1] + MORE} labels"
    caption = f"{describe(options)}; ± is the standard error;\n{late}"
    table = Table("", caption=caption, box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in columns:
        table.add_column(heading, min_width=10)
        table.add_column("minus random", min_width=10)
    for index, name in enumerate(ACQUISITIONS):
        cells = [name]
        for scores, digits in columns.values():
            score = scores[index]
            cells.append(f"{score.mean():{digits}} ± {standard_error(score):{digits}}")
            cells.append(with_error(score - scores[0], digits) if index else "")
        table.add_row(*cells)
    Console().print(table)


def standard_error(scores: np.ndarray) -> np.ndarray:
    """Returns the standard error of the mean over the first axis."""
    return scores.std(axis=0, ddof=1) / np.sqrt(len(scores))


def save_curves(path: pathlib.Path, counts: np.ndarray, accuracies: np.ndarray, title: str) -> None:
    """Draws the accuracies, and their paired differences from random order."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"{title}; bands: standard error", fontsize=12)
    panels = {"test accuracy": accuracies, "minus random, in pairs": accuracies - accuracies[:1]}
    for panel, (heading, scores) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        panel.set_title(heading, loc="left", fontsize=11)
        lines = zip(_digits.COLOURS, _digits.DASHES, ACQUISITIONS, scores, strict=False)
        for colour, dashes, name, score in lines:
            mean, error = score.mean(axis=0), standard_error(score)
            panel.plot(counts, mean, linestyle=dashes, color=colour, linewidth=2, label=name)
            panel.fill_between(counts, mean - error, mean + error, color=colour, alpha=0.2)
        panel.set_xlabel("labels")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def describe(options: argparse.Namespace) -> str:
    return (
        f"{MORE} labels more in a round, from {FIRST} on; 2 hidden layers of {options.width}\n"
        f"dropout at rate {options.rate:g}, {options.samples} masks; {options.seeds} runs"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Active learning on handwritten digits with Monte Carlo dropout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        conflict_handler="resolve",  # if an option is added twice, the second one wins
    )
    add = parser.add_argument
    train_mlp.add_training_options(add)
    train_mlp.add_comparison_options(add)
    several = checked(int, lambda n: n >= 2, "a whole number of at least 2")
    percent = checked(float, lambda x: 0 < x < 100, "a number above 0 and below 100")
    most = _digits.POOL_SIZE
    size = checked(int, lambda n: FIRST <= n <= most, f"a whole number from {FIRST} to {most}")
    add("--samples", type=several, default=50, help="masks per score")
    add("--target", type=percent, default=90.0, help="test accuracy to reach, in percent")
    add("--train-size", type=size, help="labels in the last round")
    parser.set_defaults(train_size=300, label_noise=0.0, steps=300)
    parser.set_defaults(batch_size=32, learning_rate=3e-3)
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
