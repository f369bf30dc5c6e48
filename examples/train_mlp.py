"""Trains a small network on handwritten digits, without and with dropout.

There are few samples, and some labels are wrong: without dropout the network ends up memorising the
mistakes. Each setting is trained several times, and the two runs of a pair share samples, wrong
labels, initial parameters and batches, so they differ only in the dropout.

    python examples/train_mlp.py
    python examples/train_mlp.py --api linen --rate 0.3 --label-noise 0.1

All randomness derives from one key and the step number. The same command on the same machine ends
with the same parameters, bit for bit; compare the digest in the last line.
"""

import argparse
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import checked, parse_and_make_output
from flax import linen, nnx
from rich.console import Console
from rich.progress import Progress

import jdropout.linen
import jdropout.nnx


def main() -> None:
    options = parse_options()
    rates = {"no dropout": 0.0, "dropout": options.rate}
    trainings = {name: make_training(options, rate) for name, rate in rates.items()}
    histories, params = train_each(options, trainings)
    steps = evaluation_steps(options.steps)
    _digits.print_results(histories, steps, describe(options))
    path = options.output / "train_mlp.png"
    _digits.save_curves(path, histories, steps, describe(options))
    print(f"learning curves: {path}")
    print(f"digest: {digest(params)}")


class NnxMLP(nnx.Module):
    """Two hidden layers, each followed by dropout. No key means evaluation."""

    def __init__(self, width: int, rate: float, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(_digits.PIXELS, width, rngs=rngs)
        self.hidden2 = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, _digits.CLASSES, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(rate)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits."""
        for index, hidden in enumerate([self.hidden1, self.hidden2]):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x = nnx.relu(hidden(x))
            x = self.dropout(x, deterministic=key is None, rngs=layer_key)
        return self.output(x)


class LinenMLP(linen.Module):
    """The same network for Flax linen."""

    width: int
    rate: float

    @linen.compact
    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits."""
        for index in range(2):
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x = linen.relu(linen.Dense(self.width)(x))
            x = jdropout.linen.Dropout(self.rate)(x, deterministic=key is None, rng=layer_key)
        return linen.Dense(_digits.CLASSES)(x)


class Network(NamedTuple):
    """A network as two pure functions, so both APIs share the training code."""

    init: Callable[[jax.Array], optax.Params]
    """Maps a key to parameters."""
    apply: Callable[[optax.Params, jax.Array, jax.Array | None], jax.Array]
    """Maps parameters, images and a key (None in evaluation) to logits."""


def nnx_network(
    width: int, rate: float, model: Callable[[int, float, nnx.Rngs], nnx.Module] = NnxMLP
) -> Network:
    def init(key: jax.Array) -> optax.Params:
        return nnx.state(model(width, rate, nnx.Rngs(key)))

    structure = nnx.graphdef(nnx.eval_shape(lambda: model(width, rate, nnx.Rngs(0))))
    return Network(init, lambda params, x, key: nnx.merge(structure, params)(x, key))


def linen_network(width: int, rate: float) -> Network:
    model = LinenMLP(width, rate)
    return Network(lambda key: model.init(key, jnp.zeros((1, _digits.PIXELS)), None), model.apply)


NETWORKS = {"nnx": nnx_network, "linen": linen_network}


class Training(NamedTuple):
    """Settings that all runs share."""

    network_at: Callable[[jax.Array], Network]
    """Maps a step to the network, in which only the rate may depend on the step."""
    optimizer: optax.GradientTransformation
    batch_size: int
    evaluations: int = 50
    """Maximum number of evaluations, evenly spaced."""


def make_training(options: argparse.Namespace, rate: float) -> Training:
    network = NETWORKS[options.api](options.width, rate)
    return Training(lambda _: network, optax.adam(options.learning_rate), options.batch_size)


class Run(NamedTuple):
    """A run and its training state; or all runs, along a leading axis."""

    key: jax.Array
    data: _digits.Data
    params: optax.Params
    optimizer_state: optax.OptState


def train_each(
    options: argparse.Namespace, trainings: Mapping[str, Training]
) -> tuple[dict[str, _digits.Scores], dict[str, optax.Params]]:
    """Trains with each setting, from the same start; returns histories and parameters."""
    runs = start(options, next(iter(trainings.values())))
    histories, params = {}, {}
    bar_console = Console(stderr=True)
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        for name, training in trainings.items():
            bar = progress.add_task(name, total=options.steps)
            advance = functools.partial(progress.advance, bar)
            histories[name], params[name] = train(training, options.steps, runs, advance)
    return histories, params


def start(options: argparse.Namespace, training: Training) -> Run:
    """Returns all runs before their first step, which are the same for every rate."""
    pool, test = _digits.load()

    def start_one(key: jax.Array) -> Run:
        data_key, init_key, train_key = jax.random.split(key, 3)
        data = _digits.draw(data_key, pool, test, options.train_size, options.label_noise)
        params = training.network_at(jnp.int32(0)).init(init_key)
        return Run(train_key, data, params, training.optimizer.init(params))

    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    return jax.jit(jax.vmap(start_one))(keys)


def train(
    training: Training, steps: int, runs: Run, advance: Callable[[int], None]
) -> tuple[_digits.Scores, optax.Params]:
    """Trains all runs side by side; returns their history and their parameters."""
    train_all = jax.jit(jax.vmap(functools.partial(train_steps, training), (0, None, None)))
    history, first = [], 0
    for last in evaluation_steps(steps, training.evaluations):
        runs, scores = train_all(runs, first, last)
        history.append(jax.device_get(scores))
        advance(last - first)
        first = last
    return _digits.Scores(*np.stack(history, axis=-1)), runs.params


def train_steps(
    training: Training, run: Run, first: jax.Array, last: jax.Array
) -> tuple[Run, _digits.Scores]:
    """Runs the steps first, ..., last - 1 and evaluates."""
    run = jax.lax.fori_loop(first, last, functools.partial(train_step, training), run)
    network = training.network_at(last)
    train_accuracy, train_loss = evaluate(network, run.params, run.data.train)
    test_accuracy, test_loss = evaluate(network, run.params, run.data.test)
    return run, _digits.Scores(train_accuracy, test_accuracy, train_loss, test_loss)


def train_step(training: Training, step: jax.Array, run: Run) -> Run:
    """Runs one step. Its randomness depends only on the run's key and the step."""
    batch_key, dropout_key = jax.random.split(jax.random.fold_in(run.key, step))
    images, labels = run.data.train
    rows = jax.random.randint(batch_key, (training.batch_size,), 0, len(labels))
    network = training.network_at(step)

    def loss(params: optax.Params) -> jax.Array:
        logits = network.apply(params, images[rows], dropout_key)
        return cross_entropy(logits, labels[rows])

    gradient = jax.grad(loss)(run.params)
    updates, optimizer_state = training.optimizer.update(gradient, run.optimizer_state)
    params = optax.apply_updates(run.params, updates)
    return run._replace(params=params, optimizer_state=optimizer_state)


def evaluate(
    network: Network, params: optax.Params, samples: _digits.Samples
) -> tuple[jax.Array, jax.Array]:
    """Returns accuracy and loss, with dropout off whatever the rate in training."""
    logits = network.apply(params, samples.images, None)
    accuracy = (logits.argmax(axis=-1) == samples.labels).mean()
    return accuracy, cross_entropy(logits, samples.labels)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def evaluation_steps(steps: int, most: int = 50) -> list[int]:
    """Returns up to `most` step numbers, evenly spaced and ending at `steps`."""
    count = min(steps, most)
    return [steps * (index + 1) // count for index in range(count)]


def digest(params: optax.Params) -> str:
    leaves = jax.tree.leaves(jax.device_get(params))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:16]


def describe(options: argparse.Namespace, more: str = "", model: str | None = None) -> str:
    model = model or f"2 hidden layers of {options.width}"
    return (
        f"{options.train_size} training samples, {100 * options.label_noise:g}% of the labels "
        f"wrong; {model}\n"
        f"dropout at rate {options.rate:g}, {options.steps} steps{more}; "
        f"mean and standard deviation of {options.seeds} runs"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a network on handwritten digits, without and with dropout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--api", choices=NETWORKS, default="nnx", help="Flax API of the model")
    add_training_options(add)
    add_comparison_options(add)
    return parse_and_make_output(parser)


def add_comparison_options(add: Callable[..., object]) -> None:
    several = checked(int, lambda n: n >= 2, "a whole number of at least 2, to see the spread")
    add("--seeds", type=several, default=8, help="number of runs of each setting")
    add("--output", type=pathlib.Path, default="output", help="directory for the figure")


def add_training_options(add: Callable[..., object]) -> None:
    """Adds the options of a single run; `add` is a parser's `add_argument`."""
    probability = checked(float, lambda p: 0 <= p < 1, "a number of at least 0 and below 1")
    positive = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    size = checked(int, lambda n: 1 <= n <= _digits.POOL_SIZE, f"1 to {_digits.POOL_SIZE}")
    step_size = checked(float, lambda x: 0 < x < math.inf, "a finite number above 0")
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    add("--rate", type=probability, default=0.5, help="probability of dropping")
    add("--width", type=positive, default=64, help="units or channels per layer")
    add("--steps", type=positive, default=2000, help="training steps")
    add("--batch-size", type=positive, default=64, help="samples per step")
    add("--learning-rate", type=step_size, default=1e-3, help="learning rate of Adam")
    add("--seed", type=seed, default=0, help="seed of the key")
    add("--train-size", type=size, default=500, help="training samples per run")
    add("--label-noise", type=probability, default=0.3, help="fraction of wrong training labels")


if __name__ == "__main__":
    main()
