"""Compares what networks learn with subsets, with masks and without dropout.

    python benchmarks/subset_quality.py            # about 25 minutes on two cores
    python benchmarks/subset_quality.py --quick    # a few steps, as a trial

The networks and data are those of examples/train_mlp.py, train_cnn.py and train_transformer.py. All
settings are trained from the same start on the same batches: for the same number of steps, and
once more for as many steps as fit into the time of the training without dropout.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# At the end: examples/ has an uncertainty.py too, and the one here is meant.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_cnn
import train_mlp
import train_transformer
from flax import nnx
from harness import Row
from rich import box
from rich.console import Console
from run import RESULTS, describe_environment, table

import jdropout
import jdropout.nnx
from jdropout.keys import at_site

Around = Callable[[Any, Callable[[jax.Array], jax.Array], jax.Array, float], jax.Array]


class Learned(NamedTuple):
    """What a setting learned, for each seed."""

    scores: np.ndarray
    """At the end, higher is better: accuracy in percent, or minus the loss."""
    best: np.ndarray
    """The best of all evaluations."""
    seconds: float
    """Time of a step."""


Train = Callable[[str, int], Learned]
"""Maps a setting and a number of steps to what it learned."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    studies = {study.__name__: study for study in (mlp, cnn, transformer)}
    parser.add_argument("--quick", action="store_true", help="few steps, as a trial")
    parser.add_argument("--only", action="append", default=[], choices=studies)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    environment = describe_environment(time.strftime("%Y-%m-%d"))
    console = Console(width=150, record=True, highlight=False)
    console.print(*(f"- {name}: {value}" for name, value in environment.items()), sep="\n")
    for name in options.only or studies:
        study = studies[name]
        console.print(f"\n## {name}\n\n{study.__doc__}\n")
        console.print(table(list(study(options.quick)), box.MARKDOWN))
    parts = "-".join(["subset-quality", *options.only])
    name = f"{environment['device'].replace(' ', '-')}-jax{environment['jax']}-{parts}.md"
    text = console.export_text()
    (options.output / name).write_text(f"# What networks learn with subsets\n\n{text}")


def compare(train: Train, settings: tuple[str, ...], steps: int, digits: int) -> Iterator[Row]:
    """Trains all settings twice; yields their differences from the first one, pair by pair."""
    plain, *_ = same = [train(name, steps) for name in settings]
    for name, learned in zip(settings, same, strict=True):
        ratio = learned.seconds / plain.seconds
        timed = learned if abs(ratio - 1) < 0.02 else train(name, round(steps / ratio))
        cells = {
            "time of a step": f"{ratio:.2f}",
            "at the end": f"{learned.scores.mean():.{digits}f}",
            "minus none": difference(learned.scores, plain.scores, digits),
            "best on the way, minus none": difference(learned.best, plain.best, digits),
            "equal time: end, minus none": difference(timed.scores, plain.scores, digits),
            "best, minus none": difference(timed.best, plain.best, digits),
        }
        yield Row({"dropout": name}, cells, {})


def difference(scores: np.ndarray, plain: np.ndarray, digits: int) -> str:
    return train_cnn.with_error(scores - plain, f".{digits}f")


# --- networks on digits ---------------------------------------------------------------------


def mlp(quick: bool) -> Iterator[Row]:
    """Test accuracy in percent of an MLP on digits: 2 hidden layers of 64 with dropout at 0.5, 500
    training samples, 30 % of the labels wrong, 2000 steps; mean and its standard error of 8 seeds.
    Tiles of the batch of 64 drop hidden units of their own.
    """
    options = digits_options(width=64, rate=0.5, batch_size=64, learning_rate=1e-3)
    tiles = {"none": 0, "dropout": 0, "unit_subset": 1, "unit_subset, 8 tiles": 8}

    def network(name: str) -> train_mlp.Network:
        rate = options.rate if name == "dropout" else 0.0
        plain = train_mlp.nnx_network(options.width, rate)
        if not tiles[name]:
            return plain
        apply = functools.partial(apply_mlp, tiles=tiles[name], rate=options.rate)
        return plain._replace(apply=apply)

    train = functools.partial(train_on_digits, options, network, 2 if quick else 50)
    yield from compare(train, tuple(tiles), 40 if quick else 2000, 1)


def apply_mlp(
    params: Any, x: jax.Array, key: jax.Array | None, tiles: int, rate: float
) -> jax.Array:
    """The MLP with subsets of the units of its hidden layers; the second is inside the first."""
    first, second, last = (params[name] for name in ("hidden1", "hidden2", "output"))
    drop = functools.partial(jdropout.unit_subset, rate=rate, deterministic=key is None)

    def layer(into: Any, out: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.relu(x @ into["kernel"] + into["bias"]) @ out

    def both(into: Any, out: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, tile = inputs
        hidden = nnx.relu(x @ into["kernel"] + into["bias"])
        own = None if key is None else at_site(key, ("second", tile[0]))
        return drop(own, layer, {"kernel": out, "bias": second["bias"][...]}, weights, hidden)

    weights = last["kernel"][...]
    tile = jnp.arange(len(x)) * tiles // len(x)
    into = {name: first[name][...] for name in ("kernel", "bias")}
    own = None if key is None else at_site(key, "first")
    split = tiles if key is not None else 1
    y = drop(own, both, into, second["kernel"][...], (x, tile), tiles=split)
    return y + last["bias"][...]


def cnn(quick: bool) -> Iterator[Row]:
    """Test accuracy in percent of a residual CNN on digits: 3 blocks of 16 channels, rates 0, 0.1
    and 0.2 at the branches, 500 training samples, 30 % of the labels wrong, batch of 32, 300 steps;
    mean and its standard error of 8 seeds.
    """
    options = digits_options(width=16, rate=0.2, batch_size=32, learning_rate=3e-3)
    settings = ("none", "dropout", "drop_path", "stochastic_depth")

    def network(name: str) -> train_mlp.Network:
        def model(width: int, rate: float, rngs: nnx.Rngs) -> nnx.Module:
            rates = jdropout.drop_path_rates(rate, 3)
            return CNN(functools.partial(around, name), rates, width, rngs)

        return train_mlp.nnx_network(options.width, options.rate, model)

    train = functools.partial(train_on_digits, options, network, 2 if quick else 25)
    yield from compare(train, settings, 25 if quick else 300, 1)


class CNN(train_cnn.CNN):
    """The network of the example with something around the branches of its blocks."""

    def __init__(self, around: Around, rates: list[float], width: int, rngs: nnx.Rngs):
        super().__init__((), len(rates), 1, width, 0.0, rngs)
        self.around, self.rates = around, tuple(rates)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits."""
        x = self.stem(x.reshape(-1, train_cnn.SIDE, train_cnn.SIDE, 1))
        for index, (block, rate) in enumerate(zip(self.blocks, self.rates, strict=True)):

            def branch(x: jax.Array, block: Any = block) -> jax.Array:
                y = block.conv1(nnx.relu(block.norm1(x)))
                return block.conv2(nnx.relu(block.norm2(y)))

            x = self.around(None if key is None else at_site(key, index), branch, x, rate)
            if index == 0:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.output(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def around(
    name: str, key: jax.Array | None, branch: Callable[..., jax.Array], x: jax.Array, rate: float
) -> jax.Array:
    """A residual branch with dropout of one kind; no key means evaluation."""
    if name == "stochastic_depth":
        return jdropout.stochastic_depth(key, branch, x, rate, deterministic=key is None)
    drop = {"dropout": jdropout.dropout, "drop_path": jdropout.drop_path}.get(name)
    if drop is None:
        return x + branch(x)
    return x + drop(key, branch(x), rate, deterministic=key is None)


def train_on_digits(
    options: argparse.Namespace,
    network: Callable[[str], train_mlp.Network],
    evaluations: int,
    name: str,
    steps: int,
) -> Learned:
    """Trains all seeds side by side."""
    made = network(name)
    optimizer = optax.adam(options.learning_rate)
    training = train_mlp.Training(lambda _: made, optimizer, options.batch_size)
    step = functools.partial(train_mlp.train_step, training)

    @functools.partial(jax.jit, donate_argnums=0)
    def steps_between(runs: Any, first: Any, last: Any) -> Any:
        return jax.lax.fori_loop(first, last, jax.vmap(step, in_axes=(None, 0)), runs)

    @jax.jit
    @jax.vmap
    def accuracy(run: train_mlp.Run) -> jax.Array:
        return 100 * train_mlp.evaluate(made, run.params, run.data.test)[0]

    runs = train_mlp.start(options, training)
    return learn(runs, steps, evaluations, steps_between, accuracy)


def learn(
    state: Any,
    steps: int,
    evaluations: int,
    steps_between: Callable[[Any, int, int], Any],
    score: Callable[[Any], Any],
) -> Learned:
    """Trains and evaluates in turns; only the steps are timed."""
    scores, seconds, first = [], [], 0
    for last in train_mlp.evaluation_steps(steps, evaluations):
        begin = time.perf_counter()
        state = jax.block_until_ready(steps_between(state, first, last))
        seconds.append((time.perf_counter() - begin) / (last - first))
        scores.append(np.atleast_1d(score(state)))
        first = last
    history = np.stack(scores, axis=1)
    return Learned(history[:, -1], history.max(axis=1), float(np.median(seconds)))


def digits_options(**options: Any) -> argparse.Namespace:
    return argparse.Namespace(seed=0, seeds=8, train_size=500, label_noise=0.3, **options)


# --- the transformer ------------------------------------------------------------------------

TRANSFORMER = argparse.Namespace(
    layers=4,
    width=128,
    heads=4,
    context=64,
    batch_size=16,
    learning_rate=3e-3,
    train_chars=20000,
    attention="jdropout",
)
TRANSFORMER_RATE = 0.25


def transformer(quick: bool) -> Iterator[Row]:
    """Minus the held-out loss, in nats per character, of a transformer on Python's source code: 4
    blocks of width 128, batch of 16, all rates 0.25, 20,000 characters, 300 steps; mean and its
    standard error of 4 seeds. route_tokens goes around the two inner blocks.
    """
    settings = (
        "none",
        "dropout",
        "drop_path",
        "stochastic_depth",
        "route_tokens",
        "unit_subset",
        "layer_subset",
    )
    train = functools.partial(train_transformers, 2 if quick else 10)
    yield from compare(train, settings, 20 if quick else 300, 3)


class Transformer(train_transformer.Transformer):
    """The network of the example, with dropout of one kind; its own sites have rate 0."""

    def __init__(self, name: str, rngs: nnx.Rngs):
        super().__init__(TRANSFORMER, 0.0, rngs)
        self.name = name

    def __call__(self, characters: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits of the next character at every position; no key means evaluation."""
        x = self.characters(characters) + self.positions(jnp.arange(characters.shape[-1]))
        blocks = list(self.blocks)
        rate, off = TRANSFORMER_RATE, key is None
        if self.name == "layer_subset":
            structure = nnx.graphdef(blocks[0])
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, blocks))

            def layer(params: Any, x: jax.Array) -> jax.Array:
                return run_block("none", nnx.merge(structure, params), None, x)

            x = jdropout.layer_subset(key, layer, stack, x, rate, deterministic=off)
        elif self.name == "route_tokens":

            def inner(x: jax.Array, _: jax.Array) -> jax.Array:
                for block in blocks[1:-1]:
                    x = run_block("none", block, None, x)
                return x

            x = run_block("none", blocks[0], None, x)
            x = jdropout.route_tokens(key, inner, x, rate, deterministic=off)
            x = run_block("none", blocks[-1], None, x)
        else:
            for index, block in enumerate(blocks):
                x = run_block(self.name, block, None if off else at_site(key, index), x)
        return self.logits(self.norm(x))


def run_block(name: str, block: Any, key: jax.Array | None, x: jax.Array) -> jax.Array:
    keys = [None if key is None else at_site(key, i) for i in range(2)]
    rate = TRANSFORMER_RATE
    attention: Any = block.attention
    if name == "unit_subset" and key is not None:
        attention = jdropout.nnx.UnitSubset(
            attention,
            rate,
            incoming=("query", "key", "value"),
            outgoing=("out",),
            incoming_axis=-2,
        )

    def attend(x: jax.Array) -> jax.Array:
        causal = nnx.make_causal_mask(jnp.ones((1, x.shape[1])))
        own = {"rngs": keys[0]} if name == "unit_subset" else {}
        return attention(block.attention_norm(x), mask=causal, **own)

    def feed(x: jax.Array) -> jax.Array:
        def hidden(into: Any, out: jax.Array, x: jax.Array) -> jax.Array:
            return nnx.gelu(x @ into["kernel"] + into["bias"]) @ out

        into = {part: getattr(block.hidden, part)[...] for part in ("kernel", "bias")}
        out = block.output.kernel[...]
        off = name != "unit_subset" or key is None
        normed = block.hidden_norm(x)
        y = jdropout.unit_subset(keys[1], hidden, into, out, normed, rate, deterministic=off)
        return y + block.output.bias[...]

    x = around(name, keys[0], attend, x, rate)
    return around(name, keys[1], feed, x, rate)


def train_transformers(evaluations: int, name: str, steps: int) -> Learned:
    options = argparse.Namespace(**{**vars(TRANSFORMER), "steps": steps})
    text = train_transformer.load_text(options.train_chars)
    optimizer = train_transformer.make_optimizer(options)
    structure = nnx.graphdef(nnx.eval_shape(lambda: Transformer(name, nnx.Rngs(0))))
    training = train_transformer.Training(structure, optimizer, options.batch_size, options.context)
    train_text = jnp.asarray(text.train)

    @jax.jit
    def init(key: jax.Array) -> train_transformer.State:
        params = nnx.state(Transformer(name, nnx.Rngs(key)))
        return train_transformer.State(params, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def steps_between(state: Any, key: jax.Array, first: Any, last: Any) -> Any:
        def step(number: jax.Array, state: Any) -> Any:
            return train_transformer.train_step(training, state, train_text, key, number)

        return jax.lax.fori_loop(first, last, step, state)

    losses = train_transformer.on_both(
        text,
        options.context,
        lambda params, part: train_transformer.loss(params, structure, part, None),
    )
    learned = []
    for seed in range(4):
        init_key, train_key = jax.random.split(jax.random.key(seed))

        def seeded(state: Any, first: int, last: int, key: jax.Array = train_key) -> Any:
            return steps_between(state, key, first, last)

        def score(state: Any) -> np.ndarray:
            return -np.asarray(losses(state.params)[1])

        learned.append(learn(init(init_key), steps, evaluations, seeded, score))
    return Learned(
        np.concatenate([one.scores for one in learned]),
        np.concatenate([one.best for one in learned]),
        float(np.median([one.seconds for one in learned])),
    )


if __name__ == "__main__":
    main()
