"""Tables and figures of the uncertainty example."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import _digits
import jax
import numpy as np
from _uncertainty_band import Band
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jdropout import uncertainty

RED, BLUE, GREEN, PURPLE, INK = _digits.COLOURS

Runs = np.ndarray
"""An array whose first axis is the runs."""
Scores = Mapping[str, Runs]


class Results(NamedTuple):
    """Everything that is printed and drawn."""

    likelihoods: dict[float, Runs]
    """Log-likelihoods of the validation samples, by rate."""
    separations: dict[str, dict[str, Runs]]
    """AUROC by kind of out-of-distribution input, and by measure."""
    qualities: dict[str, dict[str, dict[str, Runs]]]
    """Scores by test set, prediction and score."""
    rejections: dict[str, Runs]
    """Accuracies by measure, with axes (run, number of rejected images)."""
    many: int
    """Number of masks to compare few masks with."""
    numbers: tuple[dict[int, list[float]], dict[str, float]]
    """Errors by number of masks, and the values with many masks."""
    turn: tuple[np.ndarray, np.ndarray]
    """Pictures and logits of rotating digits."""
    band: Band


def print_tables(results: Results) -> None:
    console = Console()
    console.print(rates_table(results.likelihoods))
    console.print(separation_table(results.separations))
    console.print(quality_table(results.qualities))
    console.print(rejection_table(results.rejections))
    console.print(numbers_table(*results.numbers, results.many))


def rates_table(likelihoods: Mapping[float, Runs]) -> Table:
    table = Table("rate", "log-likelihood of the validation samples")
    for rate, values in likelihoods.items():
        table.add_row(f"{rate:g}", with_error(values))
    return table


def separation_table(separations: Mapping[str, Scores]) -> Table:
    caption = "probability that such an input is more uncertain than a test sample"
    table = Table("AUROC in %", *separations, caption=caption)
    for name in next(iter(separations.values())):
        table.add_row(name, *(percent(scores[name]) for scores in separations.values()))
    return table


def quality_table(qualities: Mapping[str, Mapping[str, Scores]]) -> Table:
    caption = "ECE: expected calibration error; NLL: negative log-likelihood"
    table = Table("", "prediction", "accuracy in %", "ECE in %", "NLL", caption=caption)
    for case, by_prediction in qualities.items():
        for name, scores in by_prediction.items():
            percents = percent(scores["accuracy"]), percent(scores["ECE"])
            table.add_row(case, name, *percents, with_error(scores["NLL"]))
        table.add_section()
    return table


def rejection_table(curves: Scores) -> Table:
    caption = "test samples and the same turned 60°, after rejecting the most uncertain ones"
    table = Table("accuracy in % without", "0 %", "20 %", "50 %", "area", caption=caption)
    for name, curve in curves.items():
        points = (curve[:, int(part * curve.shape[1])] for part in (0, 0.2, 0.5))
        table.add_row(name, *map(percent, (*points, curve.mean(axis=1))))
    return table


def numbers_table(
    errors: Mapping[int, Sequence[float]], exact: Mapping[str, float], many: int
) -> Table:
    caption = f"by {many} masks: " + ", ".join(f"{name} {x:.3f}" for name, x in exact.items())
    columns = ("error of the entropy", "spread", "formula", "left")
    coupled = ("stratified: error", "spread")
    table = Table("masks", *columns, *coupled, caption=caption)
    for count, numbers in errors.items():
        table.add_row(str(count), *(f"{number:+.4f}" for number in numbers))
    return table


def verdict(results: Results) -> str:
    """Lists what MC does better or worse than dropout off, run by run, beyond chance."""
    curves = results.rejections
    gains = {}
    for measure in ("entropy", "mutual information"):
        for case, scores in results.separations.items():
            difference = scores[f"MC: {measure}"] - scores["off: entropy"]
            gains[f"AUROC by {measure} ({case})"] = difference
        difference = curves[f"MC: {measure}"] - curves["off: entropy"]
        gains[f"rejection by {measure}"] = difference.mean(axis=1)
    for case, scores in results.qualities.items():
        for score, sign in (("accuracy", 1), ("ECE", -1), ("NLL", -1)):
            gains[f"{score} ({case})"] = sign * (scores["MC"][score] - scores["off"][score])
    t = {name: x.mean() / max(standard_error(x), 1e-12) for name, x in gains.items()}
    better = "; ".join(name for name in gains if t[name] > 2) or "nothing"
    worse = "; ".join(name for name in gains if t[name] < -2) or "nothing"
    return (
        f"MC against dropout off, beyond two standard errors of the paired differences\n"
        f"better: {better}\nworse: {worse}"
    )


def percent(values: Runs) -> str:
    return with_error(100 * values, digits=1)


def with_error(values: Runs, digits: int = 3) -> str:
    return f"{values.mean():.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_error(values: Runs) -> float:
    return values.std(ddof=1) / np.sqrt(len(values))


def draw_turn(
    path: pathlib.Path, angles: Sequence[int], pictures: np.ndarray, logits: np.ndarray, digit: int
) -> None:
    """Draws a digit at several angles, above its probabilities and its uncertainty.

    Args:
      path: file to write.
      angles: angles in degrees.
      pictures: array of shape (angle, image, pixel).
      logits: array of shape (mask, angle, image, class).
      digit: index of the image to draw.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.add_gridspec(3, 1, height_ratios=(0.24, 2, 2))
    row, above, below = (figure.add_subplot(panel) for panel in panels)
    step = angles[1] - angles[0]
    for angle, picture in zip(angles, pictures[:, digit], strict=True):
        extent = (angle - 0.45 * step, angle + 0.45 * step, 0, 1)
        row.imshow(picture.reshape(8, 8), cmap="gray_r", extent=extent, aspect="auto")
    row.set_axis_off()
    p = np.asarray(jax.nn.softmax(logits[:, :, digit]))
    mean, (low, high) = p.mean(axis=0), np.quantile(p, [0.1, 0.9], axis=0)
    for index in np.unique(mean.argmax(axis=1)):
        above.plot(angles, mean[:, index], color=f"C{index}")
        above.fill_between(
            angles, low[:, index], high[:, index], color=f"C{index}", alpha=0.15, linewidth=0
        )
        peak = mean[:, index].argmax()
        above.annotate(
            f"class {index}",
            (angles[peak], mean[peak, index]),
            (0, 3),
            textcoords="offset points",
            ha="center" if peak else "left",
            color=f"C{index}",
            fontweight="bold",
        )
    above.set(ylabel="probabilities: mean of the masks\nand their middle 80 %", ylim=(-0.05, 1.12))
    for name, measure, colour in (
        ("predictive entropy", uncertainty.predictive_entropy, RED),
        ("mutual information", uncertainty.mutual_information, BLUE),
    ):
        values = measure(logits)
        below.plot(angles, values[:, digit], color=colour, linewidth=2, label=name)
        label = f"the same, mean of {logits.shape[2]} digits"
        below.plot(angles, values.mean(axis=1), "--", color=colour, label=label)
    below.set(ylabel="uncertainty in nats", xlabel="rotation in degrees", ylim=(0, None))
    for axes in (row, above, below):
        axes.set_xlim(angles[0] - step / 2, angles[-1] + step / 2)
    below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (above, below):
        axes.set_xticks(angles[::2])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=110)


def draw_rejection(path: pathlib.Path, curves: Scores) -> None:
    """Draws accuracy against the rejected fraction, averaged over the runs."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    solid, dashed, dash_dotted, dotted, long_dashed = _digits.DASHES
    styles = (
        (PURPLE, dash_dotted),
        (GREEN, dotted),
        (GREEN, solid),
        (BLUE, dashed),
        (RED, long_dashed),
        (INK, solid),
    )
    for (name, curve), (colour, dashes) in zip(curves.items(), styles, strict=True):
        rejected = np.arange(curve.shape[1]) / curve.shape[1]
        axes.plot(rejected, curve.mean(axis=0), linestyle=dashes, color=colour, label=name)
    axes.set(xlim=(0, 1), xlabel="fraction rejected", ylabel="accuracy on the rest")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=110)
