"""Trains on digits with checkpoints: killed and restarted, it ends with the same bits.

    python examples/train_resume.py
    python examples/train_resume.py --output elsewhere --steps 4000 --microbatches 4

Kill it, even with ``kill -9``, and run it again: it resumes from its newest good checkpoint and
ends with the same digest as an uninterrupted run. A checkpoint holds the parameters, the optimizer
state and the step number, but no random state. All randomness in a step derives from the seed, the
step and the name of the site: `jdropout.keys.site_key`.

The masks depend neither on the number of devices nor on the number of microbatches: those of a
sample are a function of its place in the batch of the step (`jdropout.keys.in_batch`). You can
therefore resume with others: the same units are dropped, and only the rounding of sums differs:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/train_resume.py
    python examples/train_resume.py --microbatches 4
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import _checkpoints
import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import CheckpointManager

import jdropout
from jdropout.keys import in_batch, site_key

SITES = ("hidden1", "hidden2")
SETTINGS = (
    "rate",
    "width",
    "batch_size",
    "learning_rate",
    "seed",
    "train_size",
    "label_noise",
)
"""Options that determine the training. A checkpoint belongs to one choice of them."""


def main() -> None:
    options = parse_options()
    training = make_training(options)
    data, start = make_data_and_start(options, training)
    with _checkpoints.open_directory(options.output / "checkpoints") as manager:
        state = resume(options, training, manager, start)
        state = train(options, training, manager, data, state)
    print_results(options, training, data, state)


class MLP(train_mlp.NnxMLP):
    """The network of `train_mlp`, with dropout layers that take their keys by name."""

    def __call__(self, x: jax.Array, key_at: Callable[..., jax.Array] | None) -> jax.Array:
        """Returns the logits. `key_at` maps a site to a key; without it nothing is dropped."""
        for site, hidden in zip(SITES, [self.hidden1, self.hidden2], strict=True):
            key = None if key_at is None else key_at(site=site)
            x = nnx.relu(hidden(x))
            x = self.dropout(x, deterministic=key is None, rngs=key)
        return self.output(x)


class Training(NamedTuple):
    """Everything that the steps do not change."""

    network: train_mlp.Network
    optimizer: optax.GradientTransformation
    root: jax.Array
    batch_size: int
    microbatches: int
    mesh: jax.sharding.Mesh


class State(NamedTuple):
    """The training state, as stored in a checkpoint. It contains no key."""

    step: jax.Array
    params: optax.Params
    optimizer_state: optax.OptState


def make_training(options: argparse.Namespace) -> Training:
    return Training(
        train_mlp.nnx_network(options.width, options.rate, MLP),
        optax.adam(options.learning_rate),
        jax.random.key(options.seed),
        options.batch_size,
        options.microbatches,
        make_mesh(options.batch_size // options.microbatches),
    )


def make_mesh(size: int) -> jax.sharding.Mesh:
    """Returns the largest number of devices that can share `size` samples evenly."""
    count = math.gcd(size, jax.device_count())
    _checkpoints.say(f"training on {count} of {jax.device_count()} device(s)")
    return jax.make_mesh(
        (count,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )


def make_data_and_start(
    options: argparse.Namespace, training: Training
) -> tuple[_digits.Data, State]:
    """Returns the data, on all devices, and the state before the first step, as NumPy arrays."""

    @jax.jit
    def make(pool: _digits.Samples, test: _digits.Samples) -> tuple[_digits.Data, State]:
        data_key, init_key = (site_key(training.root, step=0, site=s) for s in ("data", "init"))
        data = _digits.draw(data_key, pool, test, options.train_size, options.label_noise)
        params = training.network.init(init_key)
        return data, State(jnp.int32(0), params, training.optimizer.init(params))

    data, start = make(*_digits.load())
    return on_all_devices(training, data), jax.device_get(start)


def resume(
    options: argparse.Namespace, training: Training, manager: CheckpointManager, start: State
) -> State:
    """Returns the state of the newest good checkpoint, or the state before the first step."""
    step, state = _checkpoints.load_newest(manager, start, settings(options))
    if step > options.steps:
        raise SystemExit(
            f"argument --steps: got {options.steps}, pass at least {step}, the step of the newest "
            f"checkpoint in {manager.directory}, or another --output"
        )
    _checkpoints.say(f"resuming after step {step}" if step else "starting at step 0")
    return on_all_devices(training, state)


def settings(options: argparse.Namespace) -> dict[str, float]:
    return {f"--{name.replace('_', '-')}": getattr(options, name) for name in SETTINGS}


def train(
    options: argparse.Namespace,
    training: Training,
    manager: CheckpointManager,
    data: _digits.Data,
    state: State,
) -> State:
    """Runs the remaining steps; saves checkpoints at multiples of --save-every and at the end."""
    take_steps = jax.jit(functools.partial(train_steps, training))
    step = int(state.step)
    while step < options.steps:
        step = min(options.steps, step + options.save_every - step % options.save_every)
        state, loss = take_steps(data.train, state, np.int32(step))
        _checkpoints.save(manager, step, state, settings(options))
        _checkpoints.say(f"step {step} of {options.steps}: loss {loss:.4f}, checkpoint saved")
    return state


def train_steps(
    training: Training, samples: _digits.Samples, state: State, last: jax.Array
) -> tuple[State, jax.Array]:
    """Runs the steps state.step, ..., last - 1; also returns the last loss."""

    def take(_: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        return train_step(training, samples, carry[0])

    return jax.lax.fori_loop(state.step, last, take, (state, jnp.float32(0)))


def train_step(
    training: Training, samples: _digits.Samples, state: State
) -> tuple[State, jax.Array]:
    """Runs one step. Its randomness depends only on the root key and the step."""
    key = site_key(training.root, step=state.step, site="batch")
    rows = jax.random.randint(key, (training.batch_size,), 0, len(samples.labels))
    batch = jax.tree.map(lambda x: split_batch(training, x[rows]), samples)
    loss, gradient = accumulate(training, state.params, state.step, batch)
    updates, optimizer_state = training.optimizer.update(gradient, state.optimizer_state)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, optimizer_state), loss


def split_batch(training: Training, x: jax.Array) -> jax.Array:
    """Splits a batch into microbatches along a new first axis; all devices share each of them."""
    x = x.reshape(training.microbatches, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(training.mesh, P(None, "data")))


def accumulate(
    training: Training, params: optax.Params, step: jax.Array, batch: _digits.Samples
) -> tuple[jax.Array, optax.Params]:
    """Returns the mean loss and gradient over the microbatches, with the masks of the whole batch.

    They are the sum of `loss_and_gradient` over the microbatches, divided by their number.
    """

    def add(total, numbered):
        first, samples = numbered
        terms = loss_and_gradient(training, params, step, first, samples)
        return jax.tree.map(jnp.add, total, terms), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    size = training.batch_size // training.microbatches
    firsts = size * jnp.arange(training.microbatches)
    total, _ = jax.lax.scan(add, zeros, (firsts, batch))
    return jax.tree.map(lambda x: x / training.microbatches, total)


def loss_and_gradient(
    training: Training,
    params: optax.Params,
    step: jax.Array,
    first: jax.Array,
    samples: _digits.Samples,
) -> tuple[jax.Array, optax.Params]:
    """Returns the loss and the gradient of a microbatch whose samples are number `first`, ..."""
    root = in_batch(training.root, first, training.batch_size)
    key_at = functools.partial(site_key, root, step=step)

    def loss(params: optax.Params) -> jax.Array:
        logits = training.network.apply(params, samples.images, key_at)
        return train_mlp.cross_entropy(logits, samples.labels)

    return jax.value_and_grad(loss)(params)


def print_results(
    options: argparse.Namespace, training: Training, data: _digits.Data, state: State
) -> None:
    evaluate = jax.jit(functools.partial(train_mlp.evaluate, training.network))
    for name, samples in data._asdict().items():
        accuracy, loss = evaluate(state.params, samples)
        print(f"{name} loss {loss:.6f}, accuracy {100 * accuracy:.1f}%")
    masks = jax.jit(functools.partial(make_masks, options, training))(state.step - 1)
    print(f"masks of the last step: {train_mlp.digest(masks)}")
    print(f"digest: {train_mlp.digest(state.params)}")


def make_masks(options: argparse.Namespace, training: Training, step: jax.Array) -> jax.Array:
    """Recomputes the masks of a step, sharded over all devices as in training.

    Returns:
      Booleans of shape (layers, samples of the batch, width).
    """
    shape = (training.batch_size, options.width)
    keys = [site_key(training.root, step=step, site=site) for site in SITES]
    masks = jnp.stack([jdropout.keep_mask(key, options.rate, shape) for key in keys])
    shared = NamedSharding(training.mesh, P(None, "data"))
    return jax.lax.with_sharding_constraint(masks, shared)


def on_all_devices(training: Training, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(training.mesh, P()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on handwritten digits, with checkpoints to resume from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    train_mlp.add_training_options(add)
    positive = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    add("--microbatches", type=positive, default=1, help="number of parts of a batch")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    add("--output", type=pathlib.Path, default="output", help="directory for the checkpoints")
    options = parse_and_make_output(parser)
    if options.batch_size % options.microbatches:
        parser.error(
            f"argument --microbatches: got {options.microbatches}, pass a divisor of "
            f"--batch-size {options.batch_size}"
        )
    return options


if __name__ == "__main__":
    main()
