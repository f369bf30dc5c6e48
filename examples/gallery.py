"""Draws the whole family in one picture: every function applied to ones, at the same rate.

    python examples/gallery.py
    python examples/gallery.py --rate 0.5 --seed 7

Every cell is a number, and its colour shows what became of an input of 1. Nothing is sketched: all
cells come from calls of the library, which makes the same masks from the same seed everywhere.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _options import checked, parse_and_make_output
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import jdropout
from jdropout.keys import at_site

ROWS, COLUMNS = 8, 17  # in most panels; makes their cells squares
LOWEST, HIGHEST = -1.5, 3.0  # ends of the colour scale
REPLACED, LEFT_OUT = np.inf, np.nan  # in place of numbers
REPLACED_COLOUR, INK, MUTED = "#a855f7", "#0f172a", "#475569"
DASHES = (0, (2, 1.5))
SENTENCES = """
the dog saw a red fox
we like the old blue car
she found it <pad> <pad> <pad>
it rains on the hill <pad>
birds sing <pad> <pad> <pad> <pad>
"""
VOCABULARY = ("the", "dog", "fox", "saw", "car", "red", "old", "sing")


def main() -> None:
    options = parse_options()
    key = jax.random.key(options.seed)
    rows = [(heading, list(panels(key, options.rate))) for heading, panels in FAMILY.items()]
    path = options.output / "gallery.png"
    draw(rows, options.rate).savefig(path, dpi=200)
    print(f"{sum(len(panels) for _, panels in rows)} panels at rate {options.rate:g}: {path}")


class Panel(NamedTuple):
    """The effect of one call."""

    name: str
    """Name of the function, and options."""
    note: str
    """The elements that are dropped together."""
    rows: str
    """Name of the vertical axis."""
    columns: str
    """Name of the horizontal axis."""
    values: jax.Array | np.ndarray
    """Of shape (rows, columns), or (tile rows, tile columns, rows, columns)."""
    words: Sequence[Sequence[str]] = ()
    """Words written into the cells."""
    row_names: Sequence[str] = ()
    sizes: np.ndarray | None = None
    """Sizes of the cells, at most 1."""


Panels = Iterator[Panel]


# --- contents -----------------------------------------------------------------------------


def axes_panels(key: jax.Array, rate: float) -> Panels:
    table = jnp.ones((ROWS, COLUMNS))
    dropped = jdropout.dropout(at_site(key, "dropout"), table, rate)
    yield Panel("dropout", "each element", "example", "feature", dropped)

    dropped = jdropout.dropout(at_site(key, "shared"), table, rate, broadcast_dims=(0,))
    yield Panel(
        "dropout, broadcast_dims", "a feature, in all examples", "example", "feature", dropped
    )

    maps = jnp.ones((2, 3, 3, 5))
    dropped = jdropout.spatial_dropout(at_site(key, "spatial"), maps, rate)
    yield Panel("spatial_dropout", "a channel's whole map", "example", "channel", as_tiles(dropped))

    sequences = jnp.ones((3, ROWS, 5))
    dropped = jdropout.locked_dropout(at_site(key, "locked"), sequences, rate)
    yield Panel(
        "locked_dropout",
        "a feature, at all time steps",
        "time",
        "feature, in 3 examples",
        dropped[None],
    )


def branch_panels(key: jax.Array, rate: float) -> Panels:
    table = jnp.ones((ROWS, COLUMNS))
    dropped = jdropout.drop_path(at_site(key, "path"), table, rate)
    yield Panel("drop_path", "all of an example", "example", "feature", dropped)

    def drop_batch(index: jax.Array) -> jax.Array:
        batch_key = at_site(key, ("batch", index))
        return jdropout.drop_path(batch_key, jnp.ones((ROWS, 3)), rate, mode="batch")

    yield Panel(
        'drop_path, mode="batch"',
        "the whole batch",
        "example",
        "feature, in 4 training steps",
        jax.vmap(drop_batch)(jnp.arange(4))[None],
    )

    def run(step: jax.Array, layer: jax.Array) -> jax.Array:
        layer_key = at_site(key, ("layer", step, layer))
        return jdropout.layer_drop(layer_key, lambda x: x + 1, jnp.float32(0), rate)

    yield Panel(
        "layer_drop",
        "a whole layer, which does not run",
        "layer",
        "training step",
        jax.vmap(jax.vmap(run, (0, None)), (None, 0))(jnp.arange(COLUMNS), jnp.arange(ROWS)),
    )

    def update(time: jax.Array) -> jax.Array:
        old, new = jnp.full(ROWS, jnp.inf), jnp.ones(ROWS)
        return jdropout.zoneout(at_site(key, ("zoneout", time)), old, new, rate)

    states = jax.vmap(update, out_axes=1)(jnp.arange(COLUMNS))
    yield Panel("zoneout", "a unit keeps its old state", "unit", "time", states)


def region_panels(key: jax.Array, rate: float) -> Panels:
    dropped = jdropout.drop_block(
        at_site(key, "runs"), jnp.ones((ROWS, COLUMNS, 1)), rate, block_size=3, spatial_axes=(1,)
    )
    yield Panel("drop_block, 1-D", "runs of 3 in a sequence", "example", "time", dropped[..., 0])

    maps = jnp.ones((1, ROWS, ROWS, 2))
    for shared, name, note in (
        (True, "drop_block, 2-D", "squares, the same in all channels"),
        (False, "… shared_channels=False", "squares, different in each channel"),
    ):
        dropped = jdropout.drop_block(
            at_site(key, "squares"), maps, rate, block_size=3, shared_channels=shared
        )
        yield Panel(name, note, "height", "width, in 2 channels", as_tiles(dropped))

    patches = jnp.ones((8, 16, 1))
    _, kept = jdropout.patch_dropout(at_site(key, "patches"), patches, rate, num_prefix_tokens=0)
    values = np.full((8, 16), LEFT_OUT)
    np.put_along_axis(values, np.asarray(kept), 1.0, axis=1)
    yield Panel(
        "patch_dropout",
        f"exactly {16 - kept.shape[1]} of 16 patches",
        "",
        "2 x 4 examples of 4 x 4 patches",
        values.reshape(2, 4, 4, 4),
    )


def word_and_weight_panels(key: jax.Array, rate: float) -> Panels:
    sentences = [line.split() for line in SENTENCES.strip().splitlines()]
    words = [*sorted({word for sentence in sentences for word in sentence}), "<unk>"]
    tokens = np.array([[words.index(word) for word in sentence] for sentence in sentences])
    unknown = len(words) - 1
    dropped = jdropout.word_dropout(
        at_site(key, "words"),
        jnp.int32(tokens),
        rate,
        replacement=unknown,
        protected=(words.index("<pad>"),),
    )
    yield Panel(
        "word_dropout",
        "each word; never a protected one",
        "sentence",
        "word",
        np.where(dropped == unknown, REPLACED, 1.0),
        words=[[words[token] for token in sentence] for sentence in dropped],
    )

    table = jnp.ones((len(VOCABULARY), COLUMNS))
    dropped = jdropout.embedding_dropout(at_site(key, "rows"), table, rate)
    yield Panel(
        "embedding_dropout", "a word, wherever it occurs", "", "feature", dropped, (), VOCABULARY
    )

    weights = jnp.ones((ROWS, COLUMNS))
    dropped = jdropout.drop_connect(at_site(key, "connect"), weights, rate)
    yield Panel("drop_connect", "each weight, for all examples", "input", "unit", dropped)

    weights = jax.random.uniform(at_site(key, "weights"), (ROWS, COLUMNS), minval=0.15)
    dropped = jdropout.targeted_dropout(at_site(key, "target"), weights, rate, target_fraction=0.5)
    yield Panel(
        "targeted_dropout",
        "each weight of the smaller half",
        "input",
        "unit; area: its weight",
        jnp.where(dropped == 0, 0.0, 1.0),
        sizes=np.sqrt(weights),
    )


def value_panels(key: jax.Array, rate: float) -> Panels:
    table = jnp.ones((ROWS, COLUMNS))
    dropped = jdropout.alpha_dropout(at_site(key, "alpha"), table, rate)
    yield Panel("alpha_dropout", "each element: to SELU's floor", "example", "feature", dropped)

    maps = jnp.ones((2, 3, 3, 5))
    dropped = jdropout.feature_alpha_dropout(at_site(key, "features"), maps, rate)
    yield Panel(
        "feature_alpha_dropout", "a channel's whole map", "example", "channel", as_tiles(dropped)
    )

    inputs = jnp.broadcast_to(jnp.linspace(-3.0, 3.0, COLUMNS), table.shape)
    beta = math.log((1 - rate) / rate)
    dropped = jdropout.standout(at_site(key, "standout"), table, inputs, beta=beta)
    yield Panel("standout", "by its own activation", "example", "low … high activation", dropped)

    logit = jnp.float32(-beta)
    dropped = jdropout.concrete_dropout(at_site(key, "concrete"), table, logit)
    yield Panel("concrete_dropout", "smooth, to learn the rate", "example", "feature", dropped)


def noise_panels(key: jax.Array, rate: float) -> Panels:
    # Zeros on the left, ones on the right: multiplicative noise does not change zeros.
    halves = jnp.broadcast_to(jnp.arange(COLUMNS + 1) > COLUMNS // 2, (ROWS, COLUMNS + 1))
    halves = halves.astype(jnp.float32)
    deviation = math.sqrt(rate / (1 - rate))
    columns = "inputs of 0    |    inputs of 1"
    noisy = jdropout.gaussian_dropout(at_site(key, "times"), halves, rate)
    yield Panel("gaussian_dropout", "times normal noise", "example", columns, noisy)

    noisy = jdropout.gaussian_noise(at_site(key, "plus"), halves, deviation)
    yield Panel("gaussian_noise", "plus normal noise", "example", columns, noisy)

    noisy = jdropout.uniform_noise(at_site(key, "uniform"), halves, math.sqrt(3) * deviation)
    yield Panel("uniform_noise", "plus uniform noise", "example", columns, noisy)

    log_alpha = jnp.broadcast_to(jnp.linspace(-6.0, 1.0, COLUMNS), (ROWS, COLUMNS))
    ones = jnp.ones((ROWS, COLUMNS))
    noisy = jdropout.variational_dropout(at_site(key, "variational"), ones, log_alpha)
    yield Panel(
        "variational_dropout", "times noise of learned strength", "input", "low … high alpha", noisy
    )


FAMILY: dict[str, Callable[[jax.Array, float], Panels]] = {
    "Elements, and masks shared along axes": axes_panels,
    "Branches, layers and updates": branch_panels,
    "Regions and patches": region_panels,
    "Words and weights": word_and_weight_panels,
    "Noise": noise_panels,
    "Other values, other probabilities": value_panels,
}


def as_tiles(maps: jax.Array) -> jax.Array:
    """Turns (example, height, width, channel) into a tile for each example and channel."""
    return maps.transpose(0, 3, 1, 2)


# --- drawing ------------------------------------------------------------------------------


def draw(rows: Sequence[tuple[str, Sequence[Panel]]], rate: float) -> Figure:
    """All lengths are in inches, from the top left."""
    pitch = 2.05
    width, top, height = 10.0, 1.42, 1.0
    figure = Figure(figsize=(width, top + pitch * len(rows)), facecolor="white")
    total = figure.get_figheight()
    colours = colour_scale(rate)
    draw_header(figure, colours, rate)
    for index, (heading, panels) in enumerate(rows):
        above = top + pitch * index
        write(figure, 0.15, above, heading, fontsize=12, fontweight="bold")
        for column, panel in enumerate(panels):
            left, bottom = 0.37 + 2.445 * column, above + 0.68 + height
            area = (left / width, 1 - bottom / total, 2.12 / width, height / total)
            draw_panel(figure.add_axes(area), panel, colours)
    return figure


def write(figure: Figure, left: float, above: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - above / height, text, **{"va": "top", "color": INK, **style})


def colour_scale(rate: float) -> ScalarMappable:
    """From negative (orange) via 0 (nearly white) and 1 (light blue) to scaled values (blue)."""
    scaled = min(1 / (1 - rate), 0.9 * HIGHEST)
    anchors = {
        LOWEST: "#9a3412",
        -0.6: "#fb923c",
        0.0: "#e6eaf0",
        1.0: "#8cc2fb",
        scaled: "#1d5fe0",
        HIGHEST: "#0b1f66",
    }
    normalize = Normalize(LOWEST, HIGHEST, clip=True)
    points = [(float(normalize(value)), colour) for value, colour in anchors.items()]
    return ScalarMappable(normalize, LinearSegmentedColormap.from_list("family", points))


def draw_header(figure: Figure, colours: ScalarMappable, rate: float) -> None:
    width, height = figure.get_size_inches()
    write(figure, 0.15, 0.16, "The family, built on one law", fontsize=18, fontweight="bold")
    write(
        figure,
        0.15,
        0.56,
        f"Each function applied to ones at rate {rate:g}; below its name, what is dropped together",
        fontsize=10.5,
        color=MUTED,
    )
    scaled = 1 / (1 - rate)
    figure.legend(
        handles=[
            Patch(color=colours.to_rgba(0.0), label="0: dropped"),
            Patch(color=colours.to_rgba(1.0), label="1: kept"),
            Patch(color=colours.to_rgba(scaled), label=f"{scaled:.2f}: kept and scaled"),
            Patch(color=REPLACED_COLOUR, label="replaced, or not updated"),
            Patch(facecolor="white", edgecolor=MUTED, linestyle=DASHES, label="removed"),
        ],
        loc="upper left",
        bbox_to_anchor=(0.15 / width, 1 - 0.87 / height),
        ncols=5,
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.1,
        handletextpad=0.5,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0,
    )
    bar = figure.add_axes((7.1 / width, 1 - 0.4 / height, 2.6 / width, 0.16 / height))
    figure.colorbar(colours, cax=bar, orientation="horizontal")
    bar.set_xticks(range(math.ceil(LOWEST), math.floor(HIGHEST) + 1))
    bar.tick_params(labelsize=9.5, length=3, color=MUTED, labelcolor=INK)
    for spine in bar.spines.values():
        spine.set_visible(False)


def draw_panel(axes: Axes, panel: Panel, colours: ScalarMappable) -> None:
    values = np.asarray(panel.values, np.float64)
    tiles = values.reshape((1,) * (4 - values.ndim) + values.shape)
    down, across, rows, columns = tiles.shape
    gap = 1.0
    for top in range(down):
        for left in range(across):
            corner = (left * (columns + gap), top * (rows + gap))
            draw_tile(axes, panel, tiles[top, left], corner, colours)
    width = across * columns + (across - 1) * gap
    height = down * rows + (down - 1) * gap
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks(np.arange(len(panel.row_names)) + 0.5, panel.row_names)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK, pad=2)
    axes.set_xlabel(panel.columns, fontsize=9.5, color=MUTED, labelpad=3)
    axes.set_ylabel(panel.rows, fontsize=9.5, color=MUTED, labelpad=4)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    bold = {"family": "monospace", "fontsize": 10, "fontweight": "bold", "color": INK}
    axes.annotate(panel.name, (0, 1), (0, 17), **place, **bold)
    axes.annotate(panel.note, (0, 1), (0, 5), **place, fontsize=9.5, color=INK)


def draw_tile(
    axes: Axes,
    panel: Panel,
    values: np.ndarray,
    corner: tuple[float, float],
    colours: ScalarMappable,
) -> None:
    sizes = np.ones(values.shape) if panel.sizes is None else panel.sizes
    for (row, column), value in np.ndenumerate(values):
        x, y = corner[0] + column, corner[1] + row
        size = 0.92 * sizes[row, column]
        cell = Rectangle((x + (1 - size) / 2, y + (1 - size) / 2), size, size, linewidth=0)
        if np.isnan(value):
            cell.set(facecolor="white", edgecolor=MUTED, linewidth=0.5, linestyle=DASHES)
        elif np.isinf(value):
            cell.set(facecolor=REPLACED_COLOUR)
        else:
            cell.set(facecolor=colours.to_rgba(value))
        if panel.sizes is not None and value == 0:
            cell.set(edgecolor="#94a3b8", linewidth=0.6)
        axes.add_patch(cell)
        if panel.words:
            word = panel.words[row][column]
            colour = "white" if np.isinf(value) else INK
            axes.text(x + 0.5, y + 0.52, word, fontsize=7, color=colour, ha="center", va="center")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draws every function of the family applied to ones, at the same rate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    probability = checked(float, lambda p: 0.05 <= p <= 0.6, "a number from 0.05 to 0.6")
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    add = parser.add_argument
    add("--rate", type=probability, default=0.3, help="probability of dropping, in all panels")
    # With few decisions in a panel, chance often drops none or most; this seed comes close to rate.
    add("--seed", type=seed, default=37, help="seed of the keys")
    add("--output", type=pathlib.Path, default="output", help="directory for the picture")
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
