"""Trains a small transformer on Python's own source code, without and with dropout.

The model reads characters and predicts the next one. It learns from files in the standard library
of the Python that runs this script, and is evaluated on other files there. The text is short, so
without dropout the model ends up memorising it. Both runs start from the same parameters and see
the same batches: they differ only in the dropout.

    python examples/train_transformer.py
    python examples/train_transformer.py --rate 0.2 --train-chars 100000 --steps 3000
    python examples/train_transformer.py --attention flax

With ``--attention flax`` the attention is Flax's own, which stores the whole matrix of
probabilities and a mask for it. The second table shows the cost of a step; run both to compare.

No random state is stored: all randomness in a step derives from the seed and the step number. The
same command on the same machine ends with the same parameters, bit for bit; compare the digest in
the last line.
"""

import argparse
import functools
import hashlib
import math
import pathlib
import statistics
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import checked, parse_and_make_output
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jdropout.nnx

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
CHARS_OF_A_FILE = 3000
COLOURS = ("#c2410c", "#1d4ed8")


def main() -> None:
    options = parse_options()
    text = load_text(options.train_chars)
    runs = train(options.steps, functools.partial(start, options, text))
    print_results(options, runs)
    print_samples(options, runs, text)
    path = options.output / "train_transformer.png"
    save_curves(path, runs, describe(options))
    print(f"learning curves: {path}")
    print(f"digest: {digest([run.state.params for run in runs])}")


# --- text ---------------------------------------------------------------------------------


class Text(NamedTuple):
    """Source code as indices into the vocabulary; the two parts have no file in common."""

    train: np.ndarray
    held_out: np.ndarray


def load_text(train_chars: int) -> Text:
    """Takes two files for training, the next one for evaluation, and so on."""
    train, held_out = [], []
    for index, part in enumerate(standard_library()):
        (held_out if index % 3 == 2 else train).append(part)
    text = Text(np.concatenate(train or [[]]), np.concatenate(held_out or [[]]))
    sizes = Text(train_chars, held_out_chars(train_chars))
    if len(text.train) < sizes.train or len(text.held_out) < sizes.held_out:
        raise SystemExit(
            f"--train-chars {train_chars} is more than the standard library here has: "
            f"{len(text.train)} characters for training, {len(text.held_out)} held out"
        )
    return Text(text.train[: sizes.train], text.held_out[: sizes.held_out])


def held_out_chars(train_chars: int) -> int:
    return train_chars // 2


def standard_library() -> Iterator[np.ndarray]:
    """Yields the beginning of every public module that is a file, in alphabetical order."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("[a-z]*.py")):
        yield encode(path.read_text(encoding="utf-8", errors="ignore"))[:CHARS_OF_A_FILE]


def encode(text: str) -> np.ndarray:
    """Returns the indices of the characters, skipping any that are not in the vocabulary."""
    index = {character: number for number, character in enumerate(VOCABULARY)}
    return np.array([index[character] for character in text if character in index], np.int32)


def decode(indices: np.ndarray) -> str:
    return "".join(VOCABULARY[index] for index in indices)


# --- model --------------------------------------------------------------------------------


ATTENTIONS = {
    "jdropout": jdropout.nnx.MultiHeadAttention,
    "flax": functools.partial(nnx.MultiHeadAttention, broadcast_dropout=False),
}


class Block(nnx.Module):
    """Attention and an MLP, each on a residual branch that ends in dropout."""

    def __init__(self, options: argparse.Namespace, rate: float, rngs: nnx.Rngs):
        width = options.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = ATTENTIONS[options.attention](
            options.heads, width, dropout_rate=rate, decode=False, keep_rngs=False, rngs=rngs
        )
        self.hidden_norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.output = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(rate)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Maps (batch, context, width) to the same shape. Nothing is dropped without `rngs`."""
        randomness = {"deterministic": rngs is None, "rngs": rngs}
        causal = nnx.make_causal_mask(x[:1, :, 0])
        branch = self.attention(self.attention_norm(x), mask=causal, **randomness)
        x = x + self.dropout(branch, **randomness)
        hidden = nnx.gelu(self.hidden(self.hidden_norm(x)))
        branch = self.output(self.dropout(hidden, **randomness))
        return x + self.dropout(branch, **randomness)


class Transformer(nnx.Module):
    """A decoder: embeddings with dropout, blocks, and logits."""

    def __init__(self, options: argparse.Namespace, rate: float, rngs: nnx.Rngs):
        self.characters = nnx.Embed(len(VOCABULARY), options.width, rngs=rngs)
        self.positions = nnx.Embed(options.context, options.width, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(rate)
        self.blocks = nnx.List([Block(options, rate, rngs) for _ in range(options.layers)])
        self.norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.logits = nnx.Linear(options.width, len(VOCABULARY), rngs=rngs)

    def __call__(self, characters: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits of the next character at every position; no key means evaluation."""
        # Every dropout call takes its own key from here, derived from `key` by a counter.
        rngs = None if key is None else nnx.Rngs(dropout=key)
        x = self.characters(characters) + self.positions(jnp.arange(characters.shape[-1]))
        x = self.dropout(x, deterministic=key is None, rngs=rngs)
        for block in self.blocks:
            x = block(x, rngs)
        return self.logits(self.norm(x))


# --- training -----------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that the steps change."""

    params: nnx.State
    optimizer_state: optax.OptState


class Training(NamedTuple):
    """Everything that the steps do not change."""

    structure: nnx.GraphDef
    optimizer: optax.GradientTransformation
    batch_size: int
    context: int


class Run:
    """A training run, with or without dropout: its compiled step and its measurements."""

    def __init__(
        self,
        name: str,
        train_step: Callable[..., State],
        losses: Callable[[nnx.State], tuple[jax.Array, jax.Array]],
        state: State,
        text: jax.Array,
        key: jax.Array,
    ):
        self.name = name
        self.losses = losses
        self.state = state
        self.text = text
        self.key = key
        # Compiled ahead of time, so that no call can trigger compilation.
        begin = time.perf_counter()
        step = jax.jit(train_step, donate_argnums=0)
        self.step = step.lower(state, text, key, np.int32(0)).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.steps: list[int] = []
        self.step_seconds: list[float] = []
        self.train_losses: list[float] = []
        self.held_out_losses: list[float] = []

    def take_steps(self, first: int, last: int) -> None:
        """Runs the steps first, ..., last - 1."""
        begin = time.perf_counter()
        for step in range(first, last):
            self.state = self.step(self.state, self.text, self.key, np.int32(step))
        jax.block_until_ready(self.state)
        self.steps.append(last)
        self.step_seconds.append((time.perf_counter() - begin) / (last - first))

    def evaluate(self) -> None:
        """Adds the losses at the current parameters to the history."""
        train_loss, held_out_loss = self.losses(self.state.params)
        self.train_losses.append(float(train_loss))
        self.held_out_losses.append(float(held_out_loss))


def train(steps: int, start: Callable[[], list[Run]]) -> list[Run]:
    """Trains all runs in turns, so that they all find the machine equally busy."""
    bar_console = Console(stderr=True)
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=None)
        runs = start()
        progress.update(bar, description="training", total=len(runs) * steps)
        first = 0
        for last in evaluation_steps(steps):
            for run in runs:
                run.take_steps(first, last)
                run.evaluate()
                progress.advance(bar, last - first)
            first = last
    return runs


def start(options: argparse.Namespace, text: Text) -> list[Run]:
    """Returns both runs before their first step, with the same parameters."""
    init_key, train_key = jax.random.split(jax.random.key(options.seed))
    optimizer = make_optimizer(options)

    @jax.jit
    def init(key: jax.Array) -> State:
        params = nnx.state(Transformer(options, rate=0.0, rngs=nnx.Rngs(key)))
        return State(params, optimizer.init(params))

    state, train_text = init(init_key), jnp.asarray(text.train)
    losses = evaluation(options, text)
    runs = []
    for name, rate in {"no dropout": 0.0, "dropout": options.rate}.items():
        training = Training(
            structure(options, rate), optimizer, options.batch_size, options.context
        )
        own_state = jax.tree.map(jnp.copy, state)  # the steps overwrite it
        step = functools.partial(train_step, training)
        runs.append(Run(name, step, losses, own_state, train_text, train_key))
    return runs


def structure(options: argparse.Namespace, rate: float) -> nnx.GraphDef:
    """Returns everything in a model except its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(options, rate, nnx.Rngs(0))))


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup_steps=options.steps // 10, decay_steps=options.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def train_step(
    training: Training, state: State, text: jax.Array, key: jax.Array, step: jax.Array
) -> State:
    """Runs one step. Its randomness depends only on the key and the step."""
    batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    windows = draw_windows(batch_key, text, training.batch_size, training.context + 1)
    gradient = jax.grad(loss)(state.params, training.structure, windows, dropout_key)
    return update(training.optimizer, state, gradient)


def draw_windows(key: jax.Array, text: jax.Array, count: int, length: int) -> jax.Array:
    """Returns pieces of the text from random places."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length + 1)
    return text[starts + jnp.arange(length)]


def update(optimizer: optax.GradientTransformation, state: State, gradient: nnx.State) -> State:
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    return State(optax.apply_updates(state.params, updates), optimizer_state)


def loss(
    params: nnx.State, structure: nnx.GraphDef, windows: jax.Array, key: jax.Array | None
) -> jax.Array:
    logits = nnx.merge(structure, params)(windows[:, :-1], key)
    return cross_entropy(logits, windows)


def cross_entropy(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """Returns the mean loss over the next characters, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def evaluation(
    options: argparse.Namespace, text: Text
) -> Callable[[nnx.State], tuple[jax.Array, jax.Array]]:
    """Returns a function from parameters to the losses on both texts, without dropout."""
    model = structure(options, rate=0.0)
    return on_both(text, options.context, lambda params, part: loss(params, model, part, None))


def on_both(
    text: Text, context: int, loss: Callable[[nnx.State, jax.Array], jax.Array]
) -> Callable[[nnx.State], tuple[jax.Array, jax.Array]]:
    """Returns a function from parameters to their loss on pieces of each of the texts."""
    count = (len(text.held_out) - 1) // context
    windows = [spread_windows(part, count, context + 1) for part in text]

    @jax.jit
    def losses(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        train_loss, held_out_loss = (loss(params, part) for part in windows)
        return train_loss, held_out_loss

    return losses


def spread_windows(text: np.ndarray, count: int, length: int) -> jax.Array:
    """Returns evenly spaced pieces of the text."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return jnp.asarray(text[starts[:, None] + np.arange(length)])


def evaluation_steps(steps: int) -> list[int]:
    """Returns up to 20 step numbers, evenly spaced and ending at `steps`."""
    count = min(steps, 20)
    return [steps * (index + 1) // count for index in range(count)]


# --- generated text -----------------------------------------------------------------------


def print_samples(options: argparse.Namespace, runs: Sequence[Run], text: Text) -> None:
    """Prints how the trained models continue the held-out text."""
    line_ends = np.flatnonzero(text.held_out[options.context - 1 :] == VOCABULARY.index("\n"))
    end = options.context + (line_ends[0] if line_ends.size else 0)
    window = jnp.asarray(text.held_out[end - options.context : end])
    # Both use the same keys, which no training step has used.
    keys = jax.random.split(jax.random.fold_in(runs[0].key, options.steps), options.sample_chars)
    continue_text = jax.jit(generator(options))
    for run in runs:
        characters = continue_text(run.state.params, window, keys)
        print(f"\n{run.name}, at temperature {options.temperature:g}, continues held-out text:")
        print(textwrap.indent(decode(np.asarray(characters)), "  | ", lambda line: True))


def generator(options: argparse.Namespace) -> Callable[..., jax.Array]:
    """Returns a function from parameters, a piece of text and keys to a character for each key."""
    graph = structure(options, rate=0.0)

    def continue_text(params: nnx.State, window: jax.Array, keys: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)

        def draw(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model(window[None], None)[0, -1]
            character = jax.random.categorical(key, logits / options.temperature)
            character = character.astype(window.dtype)
            return jnp.append(window[1:], character), character

        return jax.lax.scan(draw, window, keys)[1]

    return continue_text


# --- results ------------------------------------------------------------------------------


def print_results(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    console = Console()
    console.print(losses_table(runs, describe(options)))
    console.print(costs_table(runs, f"attention: {options.attention}; median time of a step"))
    print(overfitting(runs[0]))
    print(effect_of_dropout(*runs))


def losses_table(runs: Sequence[Run], caption: str) -> Table:
    header = ("train loss", "held-out loss", "lowest held-out loss", "at step")
    table = Table("", *header, caption=caption)
    for run in runs:
        lowest, step = lowest_held_out(run)
        losses = (run.train_losses[-1], run.held_out_losses[-1], lowest)
        table.add_row(run.name, *(f"{value:.3f}" for value in losses), str(step))
    return table


def costs_table(runs: Sequence[Run], caption: str) -> Table:
    table = Table("", "time of a step", "its temporaries", "its compilation", caption=caption)
    for run in runs:
        table.add_row(
            run.name,
            f"{1e3 * statistics.median(run.step_seconds):.1f} ms",
            f"{run.step.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB",
            f"{run.compile_seconds:.1f} s",
        )
    return table


def lowest_held_out(run: Run) -> tuple[float, int]:
    return min(zip(run.held_out_losses, run.steps, strict=True))


def overfitting(plain: Run) -> str:
    lowest, step = lowest_held_out(plain)
    if step == plain.steps[-1]:
        return "without dropout the held-out loss falls until the end: too few steps to overfit"
    rise = plain.held_out_losses[-1] - lowest
    return f"without dropout the held-out loss is lowest at step {step}, then rises by {rise:.3f}"


def effect_of_dropout(plain: Run, dropped: Run) -> str:
    """Puts the numbers of the table into words."""
    at_end = dropped.held_out_losses[-1] - plain.held_out_losses[-1]
    at_best = lowest_held_out(dropped)[0] - lowest_held_out(plain)[0]
    if at_best < 0:
        verdict = "helped, and more than stopping the other run at its best step"
    elif at_end < 0:
        verdict = "helped, but stopping the other run at its best step is at least as good"
    else:
        verdict = "did not help"
    return (
        f"held-out loss with dropout minus without: {at_end:+.3f} at the end, {at_best:+.3f} "
        f"between the lowest\nin this run dropout {verdict} (one seed, so part of it may be chance)"
    )


def save_curves(path: pathlib.Path, runs: Sequence[Run], title: str) -> None:
    """Draws the losses on both texts, and marks the lowest on the held-out one."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    for colour, run in zip(COLOURS, runs, strict=True):
        lowest, step = lowest_held_out(run)
        held_out = f"{run.name}: held-out files, lowest {lowest:.2f} at step {step}"
        axes.plot(run.steps, run.held_out_losses, color=colour, linewidth=2, label=held_out)
        axes.plot(step, lowest, "o", color=colour)
        train = f"{run.name}: training files"
        axes.plot(run.steps, run.train_losses, "--", color=colour, linewidth=1.5, label=train)
    axes.set_xlabel("step")
    axes.set_ylabel("loss in evaluation, nats per character")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=110)


def describe(options: argparse.Namespace) -> str:
    return describe_training(options, f"dropout at rate {options.rate:g}, ")


def describe_training(options: argparse.Namespace, dropout: str) -> str:
    return (
        f"{options.train_chars} characters for training, {held_out_chars(options.train_chars)} "
        f"held out; layers: {options.layers}, width: {options.width}\n"
        f"{dropout}{options.steps} steps, seed {options.seed}"
    )


def digest(params: Sequence[nnx.State]) -> str:
    leaves = jax.tree.leaves(jax.device_get(params))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:16]


# --- options ------------------------------------------------------------------------------


PROBABILITY = checked(float, lambda p: 0 <= p < 1, "a number of at least 0 and below 1")
POSITIVE = checked(int, lambda n: n >= 1, "a whole number of at least 1")
ABOVE_ZERO = checked(float, lambda x: 0 < x < math.inf, "a finite number above 0")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a transformer on Python source code, without and with dropout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--attention",
        choices=ATTENTIONS,
        default="jdropout",
        help="which library's attention to use",
    )
    add("--rate", type=PROBABILITY, default=0.1, help="probability of dropping, at all sites")
    add("--heads", type=POSITIVE, default=4, help="attention heads")
    add("--sample-chars", type=POSITIVE, default=200, help="characters to generate")
    add("--temperature", type=ABOVE_ZERO, default=0.7, help="temperature of the generated text")
    add_training_options(add)
    options = parse_training_options(parser)
    if options.width % options.heads:
        parser.error(
            f"argument --heads: got {options.heads}, pass a divisor of --width {options.width}"
        )
    return options


def add_training_options(add: Callable[..., object]) -> None:
    """Adds the options of any training on the text; `add` is a parser's `add_argument`."""
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    size = checked(int, lambda n: n >= 1000, "a whole number of at least 1000")
    add("--layers", type=POSITIVE, default=2, help="layers of the model")
    add("--width", type=POSITIVE, default=128, help="features per character")
    add("--context", type=POSITIVE, default=64, help="characters that the model sees")
    add("--steps", type=POSITIVE, default=800, help="training steps")
    add("--batch-size", type=POSITIVE, default=16, help="pieces of text per step")
    add("--learning-rate", type=ABOVE_ZERO, default=3e-3, help="peak learning rate of AdamW")
    add("--seed", type=seed, default=0, help="seed of the key")
    add("--train-chars", type=size, default=40000, help="characters of the training text")
    add("--output", type=pathlib.Path, default="output", help="directory for the figure")


def parse_training_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parse_and_make_output(parser)
    if options.context >= held_out_chars(options.train_chars):
        parser.error(
            f"argument --context: got {options.context}, pass less than half of "
            f"--train-chars {options.train_chars}"
        )
    return options


if __name__ == "__main__":
    main()
