"""Measures Monte Carlo dropout's uncertainty on digits like and unlike its training data.

Networks with two hidden layers are trained without dropout and with dropout at four rates, several
times each, and validation samples choose the rate. The networks trained at that rate predict with
dropout off and by the mean over many masks (MC); the networks trained without dropout predict too:

* does uncertainty separate rotated digits, noisy digits and unseen classes from the test samples?
* are the probabilities right?
* how much does accuracy rise if the most uncertain digits are rejected?

The last table shows how much an entropy estimate suffers from few masks. The figures show a
regression with its band, a rotating digit, and accuracy against the rejected fraction.

    python examples/uncertainty.py
    python examples/uncertainty.py --samples 20 --seed 1

All randomness derives from one key: the same command on the same machine ends with the same digest.
"""

import argparse
import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import _digits
import _uncertainty_band
import _uncertainty_report as report
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output
from _uncertainty_report import Results, Runs
from rich.console import Console
from rich.progress import Progress
from scipy import ndimage
from sklearn.metrics import roc_auc_score

import jdropout
from jdropout import uncertainty
from jdropout.keys import at_site

# Everything was fixed before the first test, except the rate, which validation samples choose.
RATES = (0.1, 0.2, 0.3, 0.5)
TRAIN_SIZE, VALIDATION_SIZE = 500, 200
BATCH_SIZE, LEARNING_RATE = 64, 1e-3
UNSEEN = (7, 8, 9)
NOISE = 4.0  # standard deviation; grey values range from 0 to 16
ANGLES = range(0, 181, 10)
FEW = 200  # images, where all of them would take too long
SAMPLE_NUMBERS = (2, 5, 10, 20, 50, 100)


def main() -> None:
    options = parse_options()
    bar_console = Console(stderr=True)
    with Progress(console=bar_console, disable=not bar_console.is_terminal) as progress:
        results = experiment(options, progress)
    report.print_tables(results)
    print(f"{options.samples} masks; mean ± standard error of {options.seeds} runs")
    print(report.verdict(results))
    _uncertainty_band.draw(options.output / "uncertainty_band.png", results.band)
    path = options.output / "uncertainty_turn.png"
    report.draw_turn(path, ANGLES, *results.turn, digit=options.digit)
    report.draw_rejection(options.output / "uncertainty_rejection.png", results.rejections)
    print(f"figures: {options.output / 'uncertainty_*.png'}")
    print(f"digest: {train_mlp.digest(jax.tree.map(np.asarray, results))}")


def experiment(options: argparse.Namespace, progress: Progress) -> Results:
    key = jax.random.key(options.seed)
    pool, test = _digits.load()
    models, validation = train_models(options, progress, pool)
    logits = sample_logits(models, at_site(key, "validation"), validation.images, options.samples)
    likelihoods = uncertainty.predictive_log_likelihood(logits, validation.labels, sample_axis=1)
    by_rate = np.asarray(likelihoods.mean(axis=1)).reshape(-1, options.seeds)[1:]
    chosen = 1 + by_rate.mean(axis=1).argmax()
    plain, model = (of_rate(models, index, options.seeds) for index in (0, chosen))
    answers = {
        name: ask(plain, model, at_site(key, name), images, options.samples)
        for name, images in test_sets(at_site(key, "noise"), test.images).items()
    }
    doubts = {name: answer.doubts() for name, answer in answers.items()}
    inside = doubts.pop("test")
    separations = {name: separation(inside, outside) for name, outside in doubts.items()}
    known = ~np.isin(pool.labels, UNSEEN)
    others, _ = train_models(options, progress, _digits.Samples(*(x[known] for x in pool)))
    pair = (of_rate(others, index, options.seeds) for index in (0, chosen))
    doubts = ask(*pair, at_site(key, "unseen"), test.images, options.samples).doubts()
    known = ~np.isin(test.labels, UNSEEN)
    separations["unseen class"] = separation(
        {name: doubt[:, known] for name, doubt in doubts.items()},
        {name: doubt[:, ~known] for name, doubt in doubts.items()},
    )
    first, few = jax.tree.map(lambda leaf: leaf[0], model), test.images[:FEW]
    return Results(
        dict(zip(RATES, by_rate, strict=True)),
        separations,
        {name: answer.quality(test.labels) for name, answer in answers.items()},
        rejection_curves([answers["test"], answers["turned 60°"]], test.labels),
        options.many,
        sample_numbers(first, at_site(key, "numbers"), turned(few, 60), options.many, progress),
        turn(first, at_site(key, "turn"), few, options.samples),
        _uncertainty_band.fit(at_site(key, "band"), options.width, 3 * options.steps),
    )


class Model(NamedTuple):
    """A network, or several along a leading axis."""

    rate: jax.Array
    params: optax.Params

    def __call__(self, key: jax.Array | None, images: jax.Array) -> jax.Array:
        """Returns the logits; no key means no dropout."""
        width = self.params["params"]["Dense_0"]["bias"].shape[-1]
        network = train_mlp.linen_network(width, self.rate)
        return network.apply(self.params, scaled(images), key)


def scaled(images: jax.Array) -> jax.Array:
    return images / 8 - 1


def of_rate(models: Model, index: int, seeds: int) -> Model:
    return jax.tree.map(lambda leaf: leaf[index * seeds : (index + 1) * seeds], models)


def train_models(
    options: argparse.Namespace, progress: Progress, pool: _digits.Samples
) -> tuple[Model, _digits.Samples]:
    """Trains at rate 0 and all other rates; a run has the same samples and start at each.

    The models and their validation samples have a leading axis of size rates times runs.
    """
    optimizer = optax.adam(LEARNING_RATE)

    def start(key: jax.Array) -> train_mlp.Run:
        rows_key, init_key, train_key = jax.random.split(key, 3)
        rows = jax.random.permutation(rows_key, len(pool.labels))
        rows = rows[:TRAIN_SIZE], rows[TRAIN_SIZE : TRAIN_SIZE + VALIDATION_SIZE]
        train, validation = (_digits.Samples(pool.images[r], pool.labels[r]) for r in rows)
        params = train_mlp.linen_network(options.width, 0.0).init(init_key)
        data = _digits.Data(train._replace(images=scaled(train.images)), validation)
        return train_mlp.Run(train_key, data, params, optimizer.init(params))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None, None))
    def advance(rate: jax.Array, run: train_mlp.Run, first: int, last: int) -> train_mlp.Run:
        network = train_mlp.linen_network(options.width, rate)
        training = train_mlp.Training(lambda _: network, optimizer, BATCH_SIZE)
        return jax.lax.fori_loop(
            first, last, functools.partial(train_mlp.train_step, training), run
        )

    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    rates = jnp.repeat(jnp.array((0.0, *RATES)), options.seeds)
    runs = jax.jit(jax.vmap(start))(jnp.tile(keys, 1 + len(RATES)))
    bar = progress.add_task(f"training on {len(pool.labels)} digits", total=options.steps)
    first = 0
    for last in train_mlp.evaluation_steps(options.steps):
        runs = jax.block_until_ready(advance(rates, runs, first, last))
        progress.update(bar, completed=last)
        first = last
    return Model(rates, runs.params), runs.data.test


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def sample_logits(
    models: Model,
    key: jax.Array,
    images: jax.Array,
    count: int,
    sampling: str = "stratified",
    batch_size: int | None = None,
) -> jax.Array:
    """Maps images for each model to logits with axes (model, mask, image, class)."""

    def one(key: jax.Array, model: Model, images: jax.Array) -> jax.Array:
        prediction = jdropout.mc_predict(
            model,
            key,
            images,
            num_samples=count,
            sampling=sampling,
            batch_size=batch_size,
            return_samples=True,
        )
        return prediction.samples

    return jax.vmap(one)(jax.random.split(key, len(images)), models, images)


class Answers(NamedTuple):
    """Logits of the same images, with axes (run, image, class)."""

    plain: jax.Array
    """Logits of the networks trained without dropout."""
    off: jax.Array
    samples: jax.Array
    """Has an additional axis for the masks, after the axis of the runs."""

    def doubts(self) -> dict[str, Runs]:
        """Measures of uncertainty, with axes (run, image)."""
        doubts = {
            "no dropout: entropy": uncertainty.entropy(self.plain),
            "off: 1 - maximum": 1 - jax.nn.softmax(self.off).max(axis=-1),
            "off: entropy": uncertainty.entropy(self.off),
            "MC: entropy": uncertainty.predictive_entropy(self.samples, sample_axis=1),
            "MC: mutual information": uncertainty.mutual_information(self.samples, sample_axis=1),
        }
        return {name: np.asarray(doubt) for name, doubt in doubts.items()}

    def predictions(self) -> dict[str, jax.Array]:
        """Logits of the predictions, with axes (run, image, class)."""
        mean = uncertainty.log_mean_probabilities(self.samples, sample_axis=1)
        return {"no dropout": self.plain, "off": self.off, "MC": mean}

    def quality(self, labels: jax.Array) -> dict[str, dict[str, Runs]]:
        """Scores of each prediction, one per run."""
        error = jax.vmap(uncertainty.expected_calibration_error, (0, None))
        cross_entropy = jax.vmap(train_mlp.cross_entropy, (0, None))
        return {
            name: {
                "accuracy": np.asarray((logits.argmax(axis=-1) == labels).mean(axis=1)),
                "ECE": np.asarray(error(logits, labels)),
                "NLL": np.asarray(cross_entropy(logits, labels)),
            }
            for name, logits in self.predictions().items()
        }


def ask(plain: Model, model: Model, key: jax.Array, images: jax.Array, count: int) -> Answers:
    off = jax.vmap(lambda model: model(None, images))
    images_of_all = jnp.broadcast_to(images, (len(model.rate), *images.shape))
    return Answers(off(plain), off(model), sample_logits(model, key, images_of_all, count))


def test_sets(key: jax.Array, images: jax.Array) -> dict[str, jax.Array]:
    return {
        "test": images,
        "turned 30°": turned(images, 30),
        "turned 60°": turned(images, 60),
        "noisy": jnp.clip(images + NOISE * jax.random.normal(key, images.shape), 0, 16),
    }


def turned(images: jax.Array, angle: float) -> jax.Array:
    result = ndimage.rotate(
        np.reshape(images, (-1, 8, 8)), angle, axes=(2, 1), reshape=False, order=1
    )
    return jnp.asarray(result.reshape(images.shape))


def separation(inside: Mapping[str, Runs], outside: Mapping[str, Runs]) -> dict[str, Runs]:
    """Returns the areas under the ROC curves, by measure."""
    areas = {name: [] for name in inside}
    for name, doubts in inside.items():
        for pair in zip(doubts, outside[name], strict=True):
            is_outside = np.repeat([False, True], [len(doubt) for doubt in pair])
            areas[name].append(roc_auc_score(is_outside, np.concatenate(pair)))
    return {name: np.array(area) for name, area in areas.items()}


def rejection_curves(parts: list[Answers], labels: jax.Array) -> dict[str, Runs]:
    """Returns the accuracies when none, one, ..., all but one of the images are rejected."""
    parts = [(answers.doubts(), answers.predictions()) for answers in parts]
    curves = {}
    for name in parts[0][0]:
        prediction = name.split(":")[0]
        doubt = np.concatenate([doubts[name] for doubts, _ in parts], axis=1)
        right = np.concatenate(
            [logits[prediction].argmax(axis=-1) == labels for _, logits in parts], axis=1
        )
        curves[name] = accuracies_of_rest(doubt, right)
    curves[f"knowing {prediction}'s errors"] = accuracies_of_rest(~right, right)
    return curves


def accuracies_of_rest(doubts: Runs, right: Runs) -> Runs:
    order = np.argsort(doubts, axis=1, kind="stable")
    right = np.take_along_axis(right, order, axis=1)
    return (right.cumsum(axis=1) / np.arange(1, right.shape[1] + 1))[:, ::-1]


def sample_numbers(
    model: Model, key: jax.Array, images: jax.Array, many: int, progress: Progress
) -> tuple[dict[int, list[float]], dict[str, float]]:
    """Returns the average error of the mean's entropy by number of masks, and exact values."""

    def measured(key: jax.Array, model: Model, images: jax.Array) -> dict[str, jax.Array]:
        logits = model(key, images)
        return {"probabilities": jax.nn.softmax(logits), "entropy": uncertainty.entropy(logits)}

    bar = progress.add_task(f"{many} masks", total=many)
    moments = jdropout.mc_predict(
        measured,
        at_site(key, "many"),
        model,
        images,
        num_samples=many,
        batch_size=100,
        progress=lambda done, _: progress.update(bar, completed=done),
    )
    entropy = uncertainty.entropy(jnp.log(moments.mean["probabilities"]))
    slope = error_slope(moments.mean["probabilities"], moments.variance["probabilities"])
    alone = jax.tree.map(lambda leaf: leaf[None], model)

    @jax.jit
    def compare(groups: jax.Array) -> tuple[jax.Array, ...]:
        count = groups.shape[1]
        error = uncertainty.predictive_entropy(groups, sample_axis=1) - entropy
        p = jax.nn.softmax(groups)
        left = error + error_slope(p.mean(axis=1), p.var(axis=1, ddof=1)) / count
        return error.mean(), error.std(axis=0).mean(), -slope.mean() / count, left.mean()

    def samples_of(sampling: str, size: int) -> np.ndarray:
        """Logits of many masks, in batches of a size."""
        few = at_site(key, ("few", sampling, size))
        number = many // 2 // size * size
        (logits,) = sample_logits(alone, few, images[None], number, sampling, size)
        return np.asarray(logits)

    def errors_of(samples: np.ndarray, count: int) -> list[float]:
        """Of many predictions from so many masks each."""
        groups = samples[: len(samples) // count * count].reshape(-1, count, *samples.shape[1:])
        return [float(number) for number in compare(groups)]

    # Up to ten stratified masks are one batch, more are several batches of ten.
    independent = samples_of("independent", 10)
    coupled = {size: samples_of("stratified", size) for size in SAMPLE_NUMBERS if size <= 10}
    errors = {}
    for count in SAMPLE_NUMBERS:
        error, deviation, *_ = errors_of(coupled[min(count, 10)], count)
        errors[count] = [*errors_of(independent, count), error, deviation]
    exact = {
        "predictive entropy": float(entropy.mean()),
        "mutual information": float((entropy - moments.mean["entropy"]).mean()),
    }
    return errors, exact


def error_slope(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Returns the first-order deficit of the entropy of a mean of T distributions, times T."""
    return (variance / jnp.maximum(mean, 1e-30)).sum(axis=-1) / 2


def turn(
    model: Model, key: jax.Array, images: jax.Array, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pictures (angle, image, pixel), and logits (mask, angle, image, class)."""
    pictures = np.stack([turned(images, angle) for angle in ANGLES])
    alone = jax.tree.map(lambda leaf: leaf[None], model)
    (logits,) = sample_logits(alone, key, pictures.reshape(1, -1, pictures.shape[-1]), count)
    return pictures, np.asarray(logits.reshape(count, *pictures.shape[:2], -1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures the uncertainty of Monte Carlo dropout on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    positive = checked(int, lambda n: n >= 1, "a whole number of at least 1")
    several = checked(int, lambda n: n >= 2, "a whole number of at least 2, to see the spread")
    many = checked(int, lambda n: n >= 1000, "a whole number of at least 1000")
    seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
    image = checked(int, lambda n: 0 <= n < FEW, f"a whole number from 0 to {FEW - 1}")
    add("--samples", type=several, default=100, help="masks per prediction")
    add("--many", type=many, default=10_000, help="masks to compare few masks with")
    add("--seeds", type=several, default=8, help="number of runs of each setting")
    add("--width", type=positive, default=64, help="units per layer")
    add("--steps", type=positive, default=1000, help="training steps")
    add("--seed", type=seed, default=0, help="seed of the key")
    add("--digit", type=image, default=61, help="which of the test images to rotate in the figure")
    add("--output", type=pathlib.Path, default="output", help="directory for the figures")
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
