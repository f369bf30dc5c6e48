"""What dropout does to the input of a neuron, checked by experiment.

A neuron adds up 100 activations of 1 through weights of 1: in evaluation it receives 100. In
training, each activation is dropped with probability 0.4.

* Just setting the dropped ones to zero leaves about 60: the neuron would learn from inputs that are
  40% smaller than the inputs it receives in evaluation.
* Dropout therefore multiplies the kept ones by 1 / (1 - 0.4). A single draw may be above or below
  100, but the mean over many is 100, and evaluation uses the activations as they are.

The script draws many masks, each with its own key, and raises an error if one of its claims is
false.

    python examples/how_dropout_works.py
    python examples/how_dropout_works.py --rate 0.2 --units 500 --torch
"""

import argparse
import functools
import math
import pathlib
import sys
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _options import checked, parse_and_make_output
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jdropout

MASKED_COLOUR, SCALED_COLOUR, EVALUATION_COLOUR = "#c2410c", "#1d4ed8", "#111827"


def main() -> None:
    options = parse_options()
    torch = import_torch() if options.torch else None
    mask_key, value_key = jax.random.split(jax.random.key(options.seed))

    masked, scaled = draw_inputs(mask_key, options.rate, options.units, options.keys)
    check_kept_values(value_key, options.rate, options.units)
    check_evaluation(value_key, options.rate, options.units)
    evaluated = jdropout.dropout(None, jnp.ones(options.units), options.rate, deterministic=True)
    # A mask compares 16 random bits per element with the rate (32 where 16 would be too coarse),
    # which turns 0.4 into 26214 / 65536 = 0.399994. Scaling by this rate keeps the mean exact.
    rate = jdropout.effective_rate(options.rate)
    results = {
        "evaluation": Result(options.units, 0.0, np.float64([evaluated.sum()])),
        "masked only": masked_result(rate, options.units, masked),
        "masked and scaled": scaled_result(rate, options.units, scaled),
    }
    if torch is not None:
        inputs = draw_torch_inputs(torch, options)
        results["torch.nn.Dropout"] = scaled_result(options.rate, options.units, inputs)
    for name, result in results.items():
        check_mean(name, result)
    Console().print(make_table(results, options, rate))
    print("all checks passed")
    path = options.output / "how_dropout_works.png"
    draw_picture(path, results["masked only"], results["masked and scaled"], options)
    print(f"picture: {path}")


class Result(NamedTuple):
    """The inputs that the neuron received, and the moments that they should have."""

    mean: float
    """Theoretical mean of one draw."""
    deviation: float
    """Theoretical standard deviation of one draw."""
    inputs: np.ndarray
    """One input per key."""


def draw_inputs(
    key: jax.Array, rate: float, units: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the neuron's input for each key, with masking only and with dropout."""
    activations = jnp.ones(units)
    keys = jax.random.split(key, draws)
    masks = jax.vmap(lambda key: jdropout.keep_mask(key, rate, activations.shape))(keys)
    dropped = jax.vmap(lambda key: jdropout.dropout(key, activations, rate))(keys)
    masks, dropped = np.asarray(masks), np.asarray(dropped)
    require("dropout keeps what keep_mask keeps", np.array_equal(dropped != 0, masks))
    return masks.sum(axis=1), dropped.sum(axis=1, dtype=np.float64)


def masked_result(rate: float, units: int, inputs: np.ndarray) -> Result:
    """The number of kept activations is binomial."""
    return Result((1 - rate) * units, math.sqrt(units * rate * (1 - rate)), inputs)


def scaled_result(rate: float, units: int, inputs: np.ndarray) -> Result:
    return Result(units, math.sqrt(units * rate / (1 - rate)), inputs)


def check_mean(name: str, result: Result) -> None:
    error = result.deviation / math.sqrt(len(result.inputs))
    mean = result.inputs.mean()
    require(
        f"{name}: the mean {mean} is within 5 standard errors ({error}) of {result.mean}",
        abs(mean - result.mean) <= 5 * error,
    )


def check_kept_values(key: jax.Array, rate: float, units: int) -> None:
    """A kept value is x / (1 - p), where p is the effective rate; all others are 0."""
    value_key, mask_key = jax.random.split(key)
    x = jax.random.uniform(value_key, (units,), minval=0.5, maxval=1.5)
    kept = np.asarray(jdropout.keep_mask(mask_key, rate, x.shape))
    y = np.asarray(jdropout.dropout(mask_key, x, rate))
    scale = 1 / (1 - jdropout.effective_rate(rate))
    require("dropped values are 0", not y[~kept].any())
    require(
        "kept values are x times the float32 nearest to 1 / (1 - p), to the last bit",
        np.array_equal(y[kept], np.asarray(x)[kept] * np.float32(scale)),
    )
    require(
        "kept values are x / (1 - p) to within the two roundings to float32",
        np.allclose(y[kept], np.float64(x)[kept] * scale, rtol=2**-23, atol=0),
    )


def check_evaluation(key: jax.Array, rate: float, units: int) -> None:
    x = jax.random.uniform(key, (units,))
    y = jdropout.dropout(None, x, rate, deterministic=True)
    require("evaluation returns the same array object", y is x)


def draw_torch_inputs(torch: ModuleType, options: argparse.Namespace) -> np.ndarray:
    """Runs the same checks on PyTorch's layer; returns the neuron's inputs in training."""
    torch.manual_seed(options.seed)
    layer = torch.nn.Dropout(options.rate)
    x = torch.rand(options.units) + 0.5
    y, scaled = layer(x).numpy(), x.double().numpy() / (1 - options.rate)
    require(
        "torch.nn.Dropout: kept values are x / (1 - p), all others 0",
        np.allclose(y, np.where(y == 0, 0, scaled), rtol=2**-22, atol=0),
    )
    inputs = layer(torch.ones(options.keys, options.units)).double().sum(dim=1).numpy()
    require("torch.nn.Dropout: evaluation returns equal values", torch.equal(layer.eval()(x), x))
    return inputs


def require(claim: str, holds: bool) -> None:
    if not holds:
        raise RuntimeError(f"this claim is false: {claim}")


def make_table(results: dict[str, Result], options: argparse.Namespace, rate: float) -> Table:
    table = Table(
        "",
        "expected",
        "mean",
        "standard error",
        "deviation",
        title=f"Input of a neuron with {options.units} activations of 1, dropout at rate "
        f"{options.rate:g}",
        caption=f"Mean and standard deviation over {options.keys} keys.\n"
        f"Effective rate p = {rate:.7g}: kept values are\n"
        f"multiplied by 1 / (1 - p) = {1 / (1 - rate):.7g}.",
    )
    for name, result in results.items():
        deviation = result.inputs.std()
        error = deviation / math.sqrt(len(result.inputs))
        numbers = (result.mean, result.inputs.mean(), error, deviation)
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    return table


def draw_picture(
    path: pathlib.Path, masked: Result, scaled: Result, options: argparse.Namespace
) -> None:
    """Draws the distributions of the inputs, each labelled directly."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    units, rate = options.units, options.rate
    masked_peak = draw_histogram(axes, masked.inputs, 1.0, MASKED_COLOUR)
    scaled_peak = draw_histogram(axes, scaled.inputs, 1 / (1 - rate), SCALED_COLOUR)
    top = 1.05 * max(masked_peak, scaled_peak)
    axes.vlines(units, 0, top, color=EVALUATION_COLOUR, linewidth=3)

    # The curves may overlap, so the labels go outside both of them, where any rate leaves room.
    left = masked.mean - 1.3 * masked.deviation
    right = scaled.mean + 1.3 * scaled.deviation
    room = 0.75 * (right - left)
    axes.set_xlim(left - room, right + room)
    axes.set_ylim(0, 1.25 * top)
    write = functools.partial(axes.text, fontsize=13, fontweight="bold")
    text = f"training, dropped\nvalues set to 0:\n{(1 - rate) * units:g} on average"
    write(left, 0.6 * masked_peak, text, color=MASKED_COLOUR, ha="right")
    factor = f"\N{MULTIPLICATION SIGN} 1 / (1 - {rate:g})"
    text = f"training, and kept\nvalues {factor}:\n{units} on average"
    write(right, 0.6 * scaled_peak, text, color=SCALED_COLOUR, ha="left")
    text = f"evaluation:\nalways {units}"
    write(units, 1.03 * top, text, color=EVALUATION_COLOUR, ha="center")

    axes.set_title("Why dropout scales the values that it keeps", fontsize=15, pad=12)
    axes.set_xlabel(
        f"input of a neuron that adds up {units} activations of 1, dropout at rate {rate:g}",
        fontsize=12,
    )
    axes.tick_params(labelsize=11)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_histogram(axes: Axes, inputs: np.ndarray, spacing: float, colour: str) -> float:
    """Draws a histogram of inputs that are multiples of `spacing`; returns its peak."""
    kept, counts = np.unique(np.rint(inputs / spacing).astype(int), return_counts=True)
    heights = np.zeros(kept[-1] - kept[0] + 1)
    heights[kept - kept[0]] = counts / spacing
    edges = (np.arange(kept[0], kept[-1] + 2) - 0.5) * spacing
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.75)
    return heights.max()


def import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        sys.exit("--torch needs PyTorch, which is not installed. Try: pip install torch")
    return torch


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Checks by experiment what dropout does to the input of a neuron.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    probability = checked(float, drops_some, "a number well inside 0 to 1, such as 0.4")
    count = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    several = checked(int, lambda n: n >= 2, "a whole number of at least 2")
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    add = parser.add_argument
    add("--rate", type=probability, default=0.4, help="probability of dropping an activation")
    add("--units", type=count, default=100, help="activations that the neuron adds up")
    add("--keys", type=several, default=20_000, help="number of masks to draw")
    add("--seed", type=seed, default=0, help="seed of the keys")
    add("--torch", action="store_true", help="check torch.nn.Dropout as well")
    add("--output", type=pathlib.Path, default="output", help="directory for the picture")
    return parse_and_make_output(parser)


def drops_some(rate: float) -> bool:
    return 0 < rate < 1 and 0 < jdropout.effective_rate(rate) < 1


if __name__ == "__main__":
    main()
