"""Data, results and figures for the handwritten-digits examples."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

CLASSES = 10
PIXELS = 64
TEST_SIZE = 797
POOL_SIZE = 1000

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#0f172a")
# For readers who see no colours, and for print.
DASHES = ("-", "--", "-.", ":", (0, (8, 1, 1, 1, 1, 1)))


class Samples(NamedTuple):
    """Images and their labels."""

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """Training and test samples of a run."""

    train: Samples
    test: Samples


class Scores(NamedTuple):
    """Scores of an evaluation; in a history, NumPy arrays with axes (run, evaluation)."""

    train_accuracy: jax.Array | np.ndarray
    test_accuracy: jax.Array | np.ndarray
    train_loss: jax.Array | np.ndarray
    test_loss: jax.Array | np.ndarray


def load() -> tuple[Samples, Samples]:
    """Returns the pool of training samples, and the test samples.

    The split is always the same.
    """
    digits = load_digits()
    images, labels = jnp.float32(digits.data), jnp.int32(digits.target)
    order = jax.random.permutation(jax.random.key(0), POOL_SIZE + TEST_SIZE)
    pool, test = order[:POOL_SIZE], order[POOL_SIZE:]
    return Samples(images[pool], labels[pool]), Samples(images[test], labels[test])


def draw(key: jax.Array, pool: Samples, test: Samples, size: int, label_noise: float) -> Data:
    """Draws the training samples of a run, corrupts some labels and standardises the images.

    Args:
      key: a PRNG key.
      pool: samples to draw from, without replacement.
      test: test samples; their labels stay as they are.
      size: number of training samples.
      label_noise: probability that a training label is replaced by another digit.

    Returns:
      The data of the run. The images are standardised by statistics of its training samples.
    """
    rows_key, wrong_key, shift_key = jax.random.split(key, 3)
    rows = jax.random.permutation(rows_key, POOL_SIZE)[:size]
    wrong = jax.random.bernoulli(wrong_key, label_noise, (size,))
    shift = jax.random.randint(shift_key, (size,), 1, CLASSES)
    labels = (pool.labels[rows] + jnp.where(wrong, shift, 0)) % CLASSES
    images = pool.images[rows]
    # One scale for all pixels: a pixel at the border is 0 in nearly every image, so its own
    # standard deviation is zero or depends on a single image.
    mean, scale = images.mean(axis=0, keepdims=True), images.std()
    return Data(
        Samples((images - mean) / scale, labels),
        Samples((test.images - mean) / scale, test.labels),
    )


def print_results(histories: Mapping[str, Scores], steps: Sequence[int], caption: str) -> None:
    """Prints the table, and the gain of each setting over the first one."""
    Console().print(results_table(histories, caption))
    (_, plain), *others = histories.items()
    for name, history in others:
        print(gain(name, plain, history))
    print(best_on_the_way(histories, steps))


def results_table(histories: Mapping[str, Scores], caption: str) -> Table:
    """Makes a table of the last evaluation: mean and standard deviation over the runs."""
    table = Table("", "train accuracy", "test accuracy", "train loss", "test loss", caption=caption)
    for name, history in histories.items():
        accuracies = [
            f"{100 * score.mean():.1f} ± {100 * score.std(ddof=1):.1f}%"
            for score in (history.train_accuracy[:, -1], history.test_accuracy[:, -1])
        ]
        losses = [
            f"{score.mean():.2f} ± {score.std(ddof=1):.2f}"
            for score in (history.train_loss[:, -1], history.test_loss[:, -1])
        ]
        table.add_row(name, *accuracies, *losses)
    return table


def gain(name: str, plain: Scores, dropped: Scores) -> str:
    """Describes the paired differences in test accuracy at the end."""
    points = 100 * (dropped.test_accuracy[:, -1] - plain.test_accuracy[:, -1])
    error = points.std(ddof=1) / np.sqrt(len(points))
    return (
        f"test accuracy with {name} minus without, pair by pair: {points.mean():+.1f} ± "
        f"{error:.1f} points (mean and its standard error), {points.min():+.1f} to "
        f"{points.max():+.1f}"
    )


def best_on_the_way(histories: Mapping[str, Scores], steps: Sequence[int]) -> str:
    """Describes what early stopping would have given."""
    parts = []
    for name, history in histories.items():
        mean = history.test_accuracy.mean(axis=0)
        parts.append(f"{name} {100 * mean.max():.1f}% (step {steps[mean.argmax()]})")
    return f"highest mean test accuracy on the way: {', '.join(parts)}"


def save_curves(
    path: pathlib.Path,
    histories: Mapping[str, Scores],
    steps: Sequence[int],
    title: str,
    rates: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Draws the histories: for each score the mean and a band of one standard deviation.

    Args:
      path: file to write.
      histories: histories by name.
      steps: number of steps at each evaluation.
      title: title of the figure.
      rates: rates of the steps 0, 1, ... by name, drawn in a separate panel.
    """
    figure = Figure(figsize=(10, 6 if rates is None else 9), layout="constrained")
    figure.suptitle(title, fontsize=13)
    if rates is None:
        curves = figure
    else:
        above, curves = figure.subfigures(2, 1, height_ratios=(1, 2))
        panel = above.subplots()
        panel.set_title("rate of dropping", loc="left", fontsize=11)
        draw_panel(panel, {name: rate[None] for name, rate in rates.items()})
    axes = curves.subplots(2, 2, sharex=True, sharey="row")
    panels = {
        "train_accuracy": "accuracy on the training samples (wrong labels included)",
        "test_accuracy": "accuracy on the test samples (all labels right)",
        "train_loss": "loss on the training samples",
        "test_loss": "loss on the test samples",
    }
    for panel, (field, heading) in zip(axes.flat, panels.items(), strict=True):
        panel.set_title(heading, loc="left", fontsize=11)
        draw_panel(
            panel, {name: getattr(scores, field) for name, scores in histories.items()}, steps
        )
    for panel in axes[0]:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for panel in axes[1]:
        panel.set_xlabel("step")
    figure.savefig(path, dpi=110)


def draw_panel(
    axes: Axes, scores: Mapping[str, np.ndarray], steps: Sequence[int] | None = None
) -> None:
    """Draws scores, arrays with axes (run, step), with the name at the end of each curve."""
    for colour, dashes, score in zip(COLOURS, DASHES, scores.values(), strict=False):
        mean, spread = score.mean(axis=0), score.std(axis=0, ddof=min(1, len(score) - 1))
        x = np.arange(len(mean)) if steps is None else steps
        axes.plot(x, mean, linestyle=dashes, color=colour, linewidth=2)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    low, high = axes.get_ylim()
    ends = np.array([score[:, -1].mean() for score in scores.values()])
    gap = 0.085 * (high - low)  # height of a line of text
    heights = spread_out(ends, gap, low + gap / 2, high - gap / 2)
    for colour, name, height in zip(COLOURS, scores, heights, strict=False):
        axes.annotate(
            name,
            (x[-1], height),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=11,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def spread_out(positions: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Moves positions at least `gap` apart, keeping their order, and into bounds if they fit."""
    order = np.argsort(positions, kind="stable")
    least = gap * np.arange(len(positions))
    offsets = positions[order] - least
    # Only moving up keeps the gaps, only moving down does too, and so does the mean of both.
    up, down = np.maximum.accumulate(offsets), np.minimum.accumulate(offsets[::-1])[::-1]
    moved = np.empty_like(positions)
    moved[order] = np.clip((up + down) / 2, low, high - least[-1]) + least
    return moved
