"""Compares Monte Carlo dropout with a plain network and ensembles, on small regressions.

Each method predicts a density with networks of one hidden layer:

* a plain network, with a Gaussian of constant noise around its prediction;
* a network trained with dropout that predicts with dropout off, with the same kind of Gaussian;
* Monte Carlo dropout: the mixture of such Gaussians around the predictions under many masks, or one
  Gaussian with the mixture's moments;
* an ensemble: the mixture of such Gaussians around the predictions of five plain networks;
* a deep ensemble: five networks that also predict a variance, and one Gaussian with their moments.

The tables come from scikit-learn: diabetes; linnerud, which is tiny; and wine, a classification
table of which we predict the alcohol content. Each is split at random, 20 times, into nine tenths
for training and one tenth for testing. Rate, weight decay and noise precision are chosen for each
split and method by the likelihood on three folds of the training part.

    python examples/uncertainty_regression.py
    python examples/uncertainty_regression.py --decays 1e-5 --tables diabetes wine

All randomness derives from one key, the split and the step. The same command on the same machine
ends with the same predictions, bit for bit; compare the digest in the last line.

References: Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
in deep learning" (ICML 2016), section 5.2; Lakshminarayanan, Pritzel and Blundell, "Simple and
scalable predictive uncertainty estimation using deep ensembles" (NeurIPS 2017), here without
adversarial training.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_diabetes, load_linnerud, load_wine
from train_cnn import with_error

import jdropout
from jdropout import uncertainty
from jdropout.keys import at_site

RATES = (0.01, 0.05, 0.1, 0.2)
PRECISIONS = np.geomspace(0.25, 64, 17).astype(np.float32)
"""Precisions of the noise, for targets of variance 1."""
MEMBERS = 5
FOLDS = 3


def main() -> None:
    options = parse_options()
    tables = {name: TABLES[name]() for name in options.tables}
    results = compare(options, tables)
    for name, result in results.items():
        Console().print(results_table(f"{name}: {describe(tables[name])}", result))
        print(describe_choice(result["MC dropout"], training_size(len(tables[name].y))))
    path = options.output / "uncertainty_regression.png"
    save_differences(path, results)
    print(f"differences: {path}")
    print(f"digest: {train_mlp.digest(results)}")


class Examples(NamedTuple):
    """Inputs, of shape (examples, features), and targets."""

    x: np.ndarray | jax.Array
    y: np.ndarray | jax.Array


def diabetes() -> Examples:
    """Measurements of patients, and the progression of the disease after a year."""
    return Examples(*load_diabetes(return_X_y=True))


def linnerud() -> Examples:
    """Results of 20 men in three exercises, and their waists in inches."""
    data = load_linnerud()
    return Examples(data.data, data.target[:, data.target_names.index("Waist")])


def wine() -> Examples:
    """Twelve measurements of wines, and their alcohol content in percent."""
    data = load_wine().data
    return Examples(data[:, 1:], data[:, 0])


TABLES = {"diabetes": diabetes, "linnerud": linnerud, "wine": wine}


class Kind(NamedTuple):
    """Networks that are trained in the same way, with each weight decay."""

    rates: tuple[float, ...]
    members: int
    learns_variance: bool


KINDS = {
    "plain": Kind((0.0,), MEMBERS, False),
    "dropout": Kind(RATES, 1, False),
    "variance": Kind((0.0,), MEMBERS, True),
}
WAYS = {
    "plain": "plain",
    "masks off": "dropout",
    "MC dropout": "dropout",
    "MC moments": "dropout",
    "ensemble": "plain",
    "deep ensemble": "variance",
}
"""The kind of network that each method uses."""


class Result(NamedTuple):
    """Test scores of a method, in the table's units, and the choices made for it."""

    log_likelihood: np.ndarray
    rmse: np.ndarray
    rate: np.ndarray
    decay: np.ndarray
    precision: np.ndarray
    """Chosen precision of the noise, for targets of variance 1."""


def compare(
    options: argparse.Namespace, tables: Mapping[str, Examples]
) -> dict[str, dict[str, Result]]:
    """Returns the results of each table and method, by split."""
    results = {}
    keys = jax.random.split(jax.random.key(options.seed), options.splits)
    bar_console = Console(stderr=True)
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        bars = {name: progress.add_task(name, total=len(keys)) for name in tables}
        for name, table in tables.items():
            play_split = jax.jit(functools.partial(play, options))
            rows = []
            for key in keys:
                examples, scale = split_at_random(key, table)
                scores = jax.device_get(play_split(key, examples))
                rows.append({way: choose(options, way, scores[way], scale) for way in WAYS})
                progress.advance(bars[name])
            results[name] = {way: Result(*np.array([row[way] for row in rows]).T) for way in WAYS}
    return results


def split_at_random(key: jax.Array, table: Examples) -> tuple[Examples, float]:
    """Returns the examples, standardised by their first (training) part, and the scale of y."""
    order = np.asarray(jax.random.permutation(at_site(key, "order"), len(table.y)))
    x, y = (values[order] for values in table)
    training = slice(training_size(len(y)))
    x = (x - x[training].mean(axis=0)) / x[training].std(axis=0)
    y, scale = (y - y[training].mean()) / y[training].std(), y[training].std()
    return Examples(np.float32(x), np.float32(y)), scale


def training_size(size: int) -> int:
    return size - round(size / 10)


class Part(NamedTuple):
    """Rows to train on and rows to predict, each padded to the same number in all parts."""

    trained: np.ndarray
    num_trained: np.ndarray
    asked: np.ndarray
    num_asked: np.ndarray


def make_parts(size: int) -> Part:
    """Returns training rows and rows to predict: for each fold, and last for the test part."""
    start = training_size(size)
    asked = [*np.array_split(np.arange(start), FOLDS), np.arange(start, size)]
    trained = [np.setdiff1d(np.arange(start), rows) for rows in asked]
    columns = []
    for sets in (trained, asked):
        sizes = np.int32([len(rows) for rows in sets])
        columns += [np.int32([np.resize(rows, sizes.max()) for rows in sets]), sizes]
    return Part(*columns)


class Scores(NamedTuple):
    """Means over the predicted rows, with axes (part, candidate, precision) and (part, candidate).

    A candidate is a pair of a rate and a weight decay.
    """

    log_likelihood: Any
    squared_error: Any


def play(options: argparse.Namespace, key: jax.Array, examples: Examples) -> dict[str, Scores]:
    """Trains networks of all kinds with all candidates on all parts; returns scores by method."""
    parts = make_parts(len(examples.y))
    return jax.lax.map(functools.partial(play_part, options, key, examples), parts)


def play_part(
    options: argparse.Namespace, key: jax.Array, examples: Examples, part: Part
) -> dict[str, Scores]:
    networks = jax.vmap(functools.partial(train, options, key, examples, part))(all_jobs(options))
    x, y = (jnp.asarray(values)[part.asked] for values in examples)
    outputs = by_kind(options, jax.vmap(lambda network: forward(None, network, x))(networks))
    means = {kind: output[..., 0] for kind, output in outputs.items()}
    under_masks = jax.vmap(functools.partial(predict_under_masks, options, key, x))(
        jax.tree.map(lambda leaf: by_kind(options, leaf)["dropout"][:, 0], networks)
    )
    noise = 1 / PRECISIONS[:, None, None]
    predictions = {
        "plain": mixture(means["plain"][:, :1], y),
        "masks off": mixture(means["dropout"], y),
        "MC dropout": mixture(under_masks, y),
        "MC moments": one_gaussian(under_masks, noise, y),
        "ensemble": mixture(means["plain"], y),
        "deep ensemble": one_gaussian(
            means["variance"], variance(outputs["variance"]).mean(axis=1)[None], y
        ),
    }
    is_asked = jnp.arange(len(y)) < part.num_asked

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(is_asked, values, 0).sum(axis=-1) / part.num_asked

    return {way: Scores(*map(mean, prediction)) for way, prediction in predictions.items()}


def choose(options: argparse.Namespace, way: str, scores: Scores, scale: float) -> Result:
    """Chooses by the folds only, and returns the test scores of the choice."""
    folds = scores.log_likelihood[:FOLDS].mean(axis=0)
    candidate, index = np.unravel_index(folds.argmax(), folds.shape)
    log_likelihood = scores.log_likelihood[FOLDS, candidate, index] - np.log(scale)
    rmse = np.sqrt(scores.squared_error[FOLDS, candidate]) * scale
    rate, decay = list(itertools.product(KINDS[WAYS[way]].rates, options.decays))[candidate]
    return Result(log_likelihood, rmse, rate, decay, PRECISIONS[index])


class Job(NamedTuple):
    """Settings for training a network."""

    rate: jax.Array
    decay: jax.Array
    member: jax.Array
    learns_variance: jax.Array


def all_jobs(options: argparse.Namespace) -> Job:
    """Returns the jobs: for each kind all candidates, and for each candidate all members."""
    jobs = [
        (rate, decay, member, learns_variance)
        for rates, members, learns_variance in KINDS.values()
        for rate, decay, member in itertools.product(rates, options.decays, range(members))
    ]
    rate, decay, member, learns_variance = zip(*jobs, strict=True)
    return Job(jnp.float32(rate), jnp.float32(decay), jnp.int32(member), jnp.array(learns_variance))


def by_kind(options: argparse.Namespace, values: jax.Array) -> dict[str, jax.Array]:
    """Splits an axis of jobs by kind, into axes (candidate, member)."""
    shapes = {name: (len(k.rates) * len(options.decays), k.members) for name, k in KINDS.items()}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    pieces = jnp.split(values, ends[:-1])
    return {
        name: piece.reshape(*shape, *piece.shape[1:])
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


class Network(NamedTuple):
    """Parameters, and the rate they were trained with."""

    params: optax.Params
    rate: jax.Array


def init(key: jax.Array, features: int, width: int) -> optax.Params:
    keys = jax.random.split(key)
    return {
        "w1": jax.random.normal(keys[0], (features, width)) * np.float32(np.sqrt(2 / features)),
        "b1": jnp.zeros(width),
        "w2": jax.random.normal(keys[1], (width, 2)) / np.float32(np.sqrt(width)),
        "b2": jnp.zeros(2),
    }


def forward(key: jax.Array | None, network: Network, x: jax.Array) -> jax.Array:
    """Returns two numbers per example: the prediction, and a number that gives the variance."""
    params, rate = network
    keys = [None if key is None else at_site(key, layer) for layer in ("input", "hidden")]
    x = jdropout.dropout(keys[0], x, rate, deterministic=key is None)
    x = jax.nn.relu(x @ params["w1"] + params["b1"])
    x = jdropout.dropout(keys[1], x, rate, deterministic=key is None)
    return x @ params["w2"] + params["b2"]


def variance(output: jax.Array) -> jax.Array:
    return jax.nn.softplus(output[..., 1]) + 1e-4


def train(
    options: argparse.Namespace, key: jax.Array, examples: Examples, part: Part, job: Job
) -> Network:
    """Trains a network; its start, batches and masks depend only on the member."""
    key = jax.random.fold_in(at_site(key, "training"), job.member)
    optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))

    def take_step(step: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        params, optimizer_state = state
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        batch = jax.random.randint(batch_key, (options.batch_size,), 0, part.num_trained)
        x, y = (jnp.asarray(values)[part.trained[batch]] for values in examples)

        def loss(params: optax.Params) -> jax.Array:
            output = forward(dropout_key, Network(params, job.rate), x)
            error = jnp.square(output[:, 0] - y) / 2
            nll = uncertainty.gaussian_nll(output[:, 0], variance(output), y)
            norm = jnp.square(params["w1"]).sum() + jnp.square(params["w2"]).sum()
            return jnp.where(job.learns_variance, nll, error).mean() + job.decay * norm

        updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state

    params = init(at_site(key, "init"), examples.x.shape[1], options.width)
    state = params, optimizer.init(params)
    params, _ = jax.lax.fori_loop(0, options.steps, take_step, state)
    return Network(params, job.rate)


class Prediction(NamedTuple):
    """Log-density of the target at each precision, and squared error of the mean.

    The axes are (candidate, precision, row) and (candidate, row).
    """

    log_density: jax.Array
    squared_error: jax.Array


def predict_under_masks(
    options: argparse.Namespace, key: jax.Array, x: jax.Array, network: Network
) -> jax.Array:
    """Returns samples of the prediction, of shape (samples, rows)."""
    prediction = jdropout.mc_predict(
        forward, at_site(key, "test"), network, x, num_samples=options.samples, return_samples=True
    )
    return prediction.samples[..., 0]


def mixture(samples: jax.Array, y: jax.Array) -> Prediction:
    """Mixture of Gaussians of each precision around samples (candidates, samples, rows)."""

    def log_density(f: jax.Array) -> jax.Array:
        at = functools.partial(uncertainty.gaussian_log_likelihood, f, y)
        return jax.vmap(at)(jnp.asarray(PRECISIONS))

    return Prediction(jax.vmap(log_density)(samples), jnp.square(samples.mean(axis=1) - y[None]))


def one_gaussian(samples: jax.Array, noise: jax.Array, y: jax.Array) -> Prediction:
    """One Gaussian with the samples' mean, and their variance plus the variance of the noise.

    The noise has axes (precision, candidate, row), each of which may have size 1.
    """
    mean, total = samples.mean(axis=1), samples.var(axis=1)[None] + noise
    y = jnp.broadcast_to(y, mean.shape)
    nll = jax.vmap(lambda v: uncertainty.gaussian_nll(mean, v, y))(total)
    return Prediction(-jnp.swapaxes(nll, 0, 1), jnp.square(mean - y))


def results_table(title: str, result: Mapping[str, Result]) -> Table:
    """Makes a table of means over the splits, and of paired differences."""
    minus = "minus plain"
    table = Table(
        "", "log-lik.", minus, "RMSE", minus, title=title, box=SIMPLE, padding=(0, 1, 0, 0)
    )
    plain = result["plain"]
    digits = ".2f" if plain.rmse.mean() > 10 else ".3f"
    for way, scores in result.items():
        pairs = [(scores.log_likelihood, plain.log_likelihood, ".3f")]
        pairs += [(scores.rmse, plain.rmse, digits)]
        cells = []
        for score, reference, form in pairs:
            cells.append(f"{score.mean():{form}} ± {standard_error(score):{form}}")
            cells.append("" if way == "plain" else with_error(score - reference, form))
        table.add_row(way, *cells)
    return table


def standard_error(scores: np.ndarray) -> float:
    return scores.std(ddof=1) / np.sqrt(len(scores))


def describe(table: Examples) -> str:
    examples, features = table.x.shape
    train = training_size(examples)
    return f"{features} features, {train} examples for training, {examples - train} for the test"


def describe_choice(result: Result, num_examples: int) -> str:
    """Describes the choices, and the prior for which `model_precision` gives that precision."""
    with_unit_scale = np.array(
        [
            uncertainty.model_precision(
                rate, length_scale=1.0, weight_decay=decay, num_examples=num_examples
            )
            for rate, decay in zip(result.rate.tolist(), result.decay.tolist(), strict=True)
        ]
    )
    length_scale = np.sqrt(result.precision / with_unit_scale)
    rate, decay, precision, length_scale = map(np.median, (*result[2:], length_scale))
    return (
        f"chosen for MC dropout (medians): rate {rate:.2g}, weight decay {decay:.2g}, precision "
        f"{precision:.2g};\nmodel_precision agrees at a length scale of {length_scale:.2g}\n"
    )


def save_differences(path: pathlib.Path, results: Mapping[str, Mapping[str, Result]]) -> None:
    """Draws the paired differences from the plain network."""
    ways = list(WAYS)[1:]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle("minus the plain network: mean and standard error of the paired differences")
    headings = {"log_likelihood": "log-likelihood, more is better", "rmse": "RMSE, less is better"}
    panels = figure.subplots(len(headings), len(results), sharey=True, squeeze=False)
    for row, (field, heading) in zip(panels, headings.items(), strict=True):
        for panel, (name, result) in zip(row, results.items(), strict=True):
            panel.set_title(f"{name}: {heading}", loc="left", fontsize=10)
            panel.axvline(0, color="0.6", linewidth=1)
            for height, way in enumerate(ways):
                difference = getattr(result[way], field) - getattr(result["plain"], field)
                colour, error = _digits.COLOURS[height], standard_error(difference)
                panel.errorbar(difference.mean(), height, xerr=error, fmt="o", color=colour)
            panel.set_yticks(range(len(ways)), ways)
            panel.locator_params(axis="x", nbins=5)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    figure.savefig(path, dpi=110)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares Monte Carlo dropout with ensembles on small regressions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    several = checked(int, lambda n: n >= 2, "a whole number of at least 2")
    step_size = checked(float, lambda x: 0 < x < np.inf, "a finite number above 0")
    decay = checked(float, lambda x: 0 < x < np.inf, "finite numbers above 0")
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="tables to compare on")
    decays = (1e-3, 1e-2, 3e-2, 1e-1)
    add("--decays", nargs="+", type=decay, default=decays, help="weight decays to choose from")
    add(
        "--splits",
        type=several,
        default=20,
        help="number of random splits into training and test part",
    )
    add("--samples", type=several, default=100, help="masks per prediction")
    add("--width", type=positive, default=50, help="hidden units")
    add("--steps", type=positive, default=500, help="training steps")
    add("--batch-size", type=positive, default=32, help="examples per step")
    add("--learning-rate", type=step_size, default=1e-2, help="initial learning rate of Adam")
    add("--seed", type=seed, default=0, help="seed of the key")
    add("--output", type=pathlib.Path, default="output", help="directory for the figure")
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
