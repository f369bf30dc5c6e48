"""Trains a small residual network on images of digits, with three kinds of structured dropout.

Neighbouring elements of a feature map are similar, so dropping single elements removes little
information. This script drops larger parts:

* `drop_block` drops squares of a feature map, after each residual block;
* `spatial_dropout` drops whole channels, between the two convolutions of a block;
* `drop_path` drops the branch of a block and leaves the identity, more often in deeper blocks.

The network is trained without them, with each of them alone and with all three, several times each.
Runs with the same number share samples, wrong labels, initial parameters and batches, and the last
two columns of the table compare them in pairs.

    python examples/train_cnn.py
    python examples/train_cnn.py --rate 0.1 --block-size 2 --label-noise 0

All randomness derives from one key and the step number. The same command on the same machine ends
with the same parameters, bit for bit; compare the digest in the last line.
"""

import argparse
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from flax import nnx
from rich.console import Console
from rich.table import Table

import jdropout
from jdropout.keys import at_site

SIDE = 8
EVALUATIONS = 25
KINDS = ("drop_block", "spatial_dropout", "drop_path")
SETTINGS = {"none": (), **{kind: (kind,) for kind in KINDS}, "all three": KINDS}


def main() -> None:
    options = parse_options()
    trainings = {name: make_training(options, kinds) for name, kinds in SETTINGS.items()}
    histories, params = train_mlp.train_each(options, trainings)
    steps = train_mlp.evaluation_steps(options.steps, EVALUATIONS)
    title = describe(options)
    console = Console()
    console.print(_digits.results_table(histories, title))
    console.print(differences_table(histories))
    print(_digits.best_on_the_way(histories, steps))
    path = options.output / "train_cnn.png"
    _digits.save_curves(path, histories, steps, title)
    print(f"learning curves: {path}")
    print(f"digest: {train_mlp.digest(params)}")


class CNN(nnx.Module):
    """A convolution, then residual blocks at two scales. No key means evaluation."""

    def __init__(
        self,
        kinds: Collection[str],
        depth: int,
        block_size: int,
        width: int,
        rate: float,
        rngs: nnx.Rngs,
    ):
        self.stem = Conv(1, width, rngs)
        self.blocks = nnx.List(
            Block(kinds, block_size, width, rate, path_rate, rngs)
            for path_rate in jdropout.drop_path_rates(rate, depth)
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, _digits.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits."""
        x = self.stem(x.reshape(-1, SIDE, SIDE, 1))
        for index, block in enumerate(self.blocks):
            x = block(x, None if key is None else at_site(key, ("block", index)))
            if index == 0:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.output(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


class Block(nnx.Module):
    """Adds a branch of two convolutions to its input."""

    def __init__(
        self,
        kinds: Collection[str],
        block_size: int,
        width: int,
        rate: float,
        path_rate: float,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.conv1 = Conv(width, width, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.conv2 = Conv(width, width, rngs)
        self.block_size = block_size
        rates = {"drop_block": rate, "spatial_dropout": rate, "drop_path": path_rate}
        self.rates = {kind: rates[kind] if kind in kinds else 0.0 for kind in KINDS}

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns an array like `x`."""
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.drop(jdropout.spatial_dropout, y, key)
        y = self.conv2(nnx.relu(self.norm2(y)))
        x = x + self.drop(jdropout.drop_path, y, key)
        return self.drop(jdropout.drop_block, x, key, block_size=self.block_size)

    def drop(
        self, function: Callable[..., jax.Array], x: jax.Array, key: jax.Array | None, **more: Any
    ) -> jax.Array:
        """Calls a function of jdropout with its own key: the function's name is its site."""
        kind = function.__name__
        site_key = None if key is None else at_site(key, kind)
        return function(site_key, x, self.rates[kind], deterministic=key is None, **more)


class Conv(nnx.Linear):
    """A 3 x 3 convolution as a matrix product: in a loop on a CPU, faster than XLA's own."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__(9 * inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the same height and width."""
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return super().__call__(jnp.concatenate(shifts, axis=-1))


def make_training(options: argparse.Namespace, kinds: Collection[str]) -> train_mlp.Training:
    model = functools.partial(CNN, kinds, options.depth, options.block_size)
    network = train_mlp.nnx_network(options.width, options.rate, model)
    optimizer = optax.adam(options.learning_rate)
    return train_mlp.Training(lambda _: network, optimizer, options.batch_size, EVALUATIONS)


def differences_table(histories: Mapping[str, _digits.Scores]) -> Table:
    """Makes a table of the final scores with each kind minus those without, pair by pair."""
    caption = "mean and its standard error of the paired differences at the end"
    table = Table("minus none", "test accuracy", "test loss", caption=caption)
    (_, plain), *others = histories.items()
    for name, history in others:
        points = 100 * (history.test_accuracy[:, -1] - plain.test_accuracy[:, -1])
        nats = history.test_loss[:, -1] - plain.test_loss[:, -1]
        table.add_row(name, f"{with_error(points, '.1f')} points", with_error(nats, ".2f"))
    return table


def with_error(differences: np.ndarray, digits: str) -> str:
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{differences.mean():+{digits}} ± {error:{digits}}"


def describe(options: argparse.Namespace) -> str:
    model = f"{options.depth} residual blocks of {options.width} channels"
    square = f"{options.block_size} x {options.block_size}"
    return f"{train_mlp.describe(options, model=model)}\ndrop_block drops squares of {square}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a convolutional network on handwritten digits with structured dropout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train_mlp.add_training_options(parser.add_argument)
    train_mlp.add_comparison_options(parser.add_argument)
    size = checked(int, lambda n: 1 <= n <= SIDE, f"a whole number from 1 to {SIDE}")
    depth = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    parser.add_argument("--block-size", type=size, default=3, help="side of a dropped square")
    parser.add_argument("--depth", type=depth, default=3, help="residual blocks")
    parser.set_defaults(rate=0.2, width=16, steps=500, batch_size=32, learning_rate=3e-3)
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
