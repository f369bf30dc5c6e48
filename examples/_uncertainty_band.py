"""A one-dimensional regression with a gap in the data, and its Monte Carlo dropout band."""

import pathlib
from typing import Any, NamedTuple

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from flax import nnx
from matplotlib.figure import Figure

import jdropout
from jdropout import uncertainty
from jdropout.keys import at_site

RATE, WEIGHT_DECAY = 0.05, 1e-5
LENGTH_SCALES = np.geomspace(0.03, 3, 41)
*_, INK = _digits.COLOURS
BLUE = _digits.COLOURS[1]


class Band(NamedTuple):
    """Arrays with a trailing axis of size 1."""

    x: np.ndarray
    y: np.ndarray
    grid: np.ndarray
    samples: np.ndarray
    """Predictions on the grid, with axes (mask, point)."""
    noise: float
    """Variance of the noise."""


class MLP(train_mlp.NnxMLP):
    """The network of the digits example, but from a number to a number."""

    def __init__(self, width: int, rate: float, rngs: nnx.Rngs):
        super().__init__(width, rate, rngs)
        self.hidden1 = nnx.Linear(1, width, rngs=rngs)
        self.output = nnx.Linear(width, 1, rngs=rngs)


def fit(key: jax.Array, width: int, steps: int) -> Band:
    """Trains on 80 points; 40 others choose the length scale and thus the noise variance."""
    u = jax.random.uniform(at_site(key, "points"), (120, 1), minval=-1)
    x = 0.7 * u + 0.3 * jnp.sign(u)  # none between -0.3 and 0.3
    y = x + jnp.sin(5 * x) / 2 + 0.1 * jax.random.normal(at_site(key, "noise"), x.shape)
    (train_x, other_x), (train_y, other_y) = jnp.split(x, [80]), jnp.split(y, [80])
    network = train_mlp.nnx_network(width, RATE, MLP)
    params = train(network, key, train_x, train_y, steps)
    samples = function_samples(network, key, params, other_x)
    precisions = [
        uncertainty.model_precision(
            RATE, length_scale=scale, weight_decay=WEIGHT_DECAY, num_examples=len(train_x)
        )
        for scale in LENGTH_SCALES
    ]
    precision = max(
        precisions,
        key=lambda tau: uncertainty.gaussian_log_likelihood(samples, other_y, tau).mean(),
    )
    grid = jnp.linspace(-2, 2, 201)[:, None]
    on_grid = function_samples(network, key, params, grid)
    return Band(*map(np.asarray, (train_x, train_y, grid, on_grid)), 1 / precision)


def train(
    network: train_mlp.Network, key: jax.Array, x: jax.Array, y: jax.Array, steps: int
) -> optax.Params:
    optimizer = optax.adam(1e-2)

    def loss(params: optax.Params, key: jax.Array) -> jax.Array:
        errors = jnp.square(network.apply(params, x, key) - y)
        norm = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
        return errors.mean() / 2 + WEIGHT_DECAY * norm

    def step(index: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        params, optimizer_state = state
        gradient = jax.grad(loss)(params, at_site(key, ("step", index)))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state

    params = network.init(at_site(key, "init"))
    state = params, optimizer.init(params)
    return jax.jit(lambda state: jax.lax.fori_loop(0, steps, step, state))(state)[0]


def function_samples(
    network: train_mlp.Network, key: jax.Array, params: optax.Params, x: jax.Array
) -> jax.Array:
    def model(key: jax.Array, params: optax.Params, x: jax.Array) -> jax.Array:
        return network.apply(params, x, key)

    # Consistent samples: each is one function, which can be drawn as a line.
    return jdropout.mc_predict(
        model, key, params, x, num_samples=1000, consistent=True, return_samples=True
    ).samples


def draw(path: pathlib.Path, band: Band) -> None:
    """Draws the mean and bands of two standard deviations, without and with the noise."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    x, mean, variance = (
        values[:, 0] for values in (band.grid, band.samples.mean(0), band.samples.var(0, ddof=1))
    )
    for total, alpha, label in (
        (variance + band.noise, 0.15, "mean ± 2 standard deviations, noise included"),
        (variance, 0.3, "mean ± 2 standard deviations of the masks"),
    ):
        low, high = mean - 2 * np.sqrt(total), mean + 2 * np.sqrt(total)
        axes.fill_between(x, low, high, color=BLUE, alpha=alpha, linewidth=0, label=label)
    axes.plot(x, band.samples[:5, :, 0].T, color=BLUE, linewidth=0.6)
    axes.plot(x, mean, color=BLUE, linewidth=2, label="mean; thin: five of the samples")
    axes.plot(band.x, band.y, ".", color=INK, label="training data")
    axes.set(xlim=(-2, 2), xlabel="x", ylabel="y")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=110)
