import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from example_runs import assert_is_picture, error_of, load, run_here

SETTINGS = ["--steps=5", "--width=8", "--samples=3"]


@pytest.fixture(scope="module")
def regression():
    return load("uncertainty_regression")


@pytest.fixture(scope="module")
def active_learning():
    return load("active_learning")


@pytest.mark.examples
def test_uncertainty_regression_compares_all_ways(tmp_path):
    options = [*SETTINGS, "--splits=2", "--tables=linnerud", "--output", tmp_path]
    text = run_here("uncertainty_regression.py", *options)
    assert "3 features, 18 examples for training, 2 for the test" in text
    scores = r"^ (\w[\w ]*\w) +-?\d+\.\d+ ± \d+\.\d+ "
    ways = ["plain", "masks off", "MC dropout", "MC moments", "ensemble", "deep ensemble"]
    assert re.findall(scores, text, re.MULTILINE) == ways
    differences = re.findall(r"^ (\w[\w ]*\w) .* [+-]\d.* ± .* [+-]\d.* ± ", text, re.MULTILINE)
    assert differences == ways[1:]
    assert "chosen for MC dropout" in text
    assert_is_picture(tmp_path / "uncertainty_regression.png")


@pytest.mark.examples
def test_active_learning_compares_acquisitions(tmp_path):
    options = [*SETTINGS, "--seeds=2", "--train-size=40", "--output", tmp_path]
    text = run_here("active_learning.py", *options)
    rows = re.findall(r"^ (\w+) +\d+ ± \d+ (.*)", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["random", "entropy", "BALD"]
    assert [len(re.findall(r"[+-]\d", rest)) for _, rest in rows] == [0, 3, 3]
    assert "does not get to 90% counts as 50 labels" in text
    assert_is_picture(tmp_path / "active_learning.png")


@pytest.mark.parametrize(
    ("example", "option", "value"),
    [
        ("uncertainty_regression", "--splits", "1"),
        ("active_learning", "--train-size", "19"),
    ],
)
def test_bad_options_are_named(example, option, value, capsys):
    assert error_of(example, option, value) == 2
    assert f"argument {option}: got {value}, pass " in capsys.readouterr().err


@pytest.mark.parametrize("size", [20, 178, 442])
def test_no_fold_of_the_regression_trains_on_what_it_predicts(size, regression):
    parts = regression.make_parts(size)
    training = set(range(regression.training_size(size)))
    asked = []
    for trained, num_trained, rows, num_asked in zip(*parts, strict=True):
        assert set(trained) == set(trained[:num_trained])  # those behind are repetitions
        assert set(trained) <= training
        assert not set(trained) & set(rows)
        asked.append(set(rows[:num_asked]))
    *folds, test = asked
    assert set.union(*folds) == training
    assert sum(map(len, folds)) == len(training)
    assert test == set(range(size)) - training
    assert set(parts.trained[-1]) == training


def test_the_regression_standardises_by_the_training_part(regression):
    table = regression.wine()
    examples, scale = regression.split_at_random(jax.random.key(3), table)
    part = slice(regression.training_size(len(table.y)))
    np.testing.assert_allclose(examples.x[part].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(examples.y[part].std(), 1, rtol=1e-5)
    assert abs(examples.x.mean(axis=0)).max() > 1e-3  # of all, the test part included
    # In another order and on another scale: the same targets.
    errors = np.sort(examples.y * scale) - np.sort(table.y)
    np.testing.assert_allclose(errors, errors.mean(), atol=1e-5)


def test_the_regression_chooses_by_the_folds_alone(regression):
    options = argparse.Namespace(decays=[0.1, 0.2, 0.3, 0.4])
    shape = (regression.FOLDS + 1, 4, len(regression.PRECISIONS))
    likelihood = np.random.default_rng(0).normal(-5, 1, shape)
    likelihood[:-1, 2, 7] = 0
    likelihood[-1, 1, 3] = 9  # the best of the test
    squares = np.random.default_rng(1).uniform(1, 2, shape[:2])
    result = regression.choose(options, "plain", regression.Scores(likelihood, squares), 3.0)
    assert result.decay == 0.3
    assert result.rate == 0
    assert result.precision == regression.PRECISIONS[7]
    assert result.log_likelihood == pytest.approx(likelihood[-1, 2, 7] - np.log(3))
    assert result.rmse == pytest.approx(3 * np.sqrt(squares[-1, 2]))


def test_the_densities_of_the_regression_are_those_of_scipy(regression):
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(2, 7, 5))  # candidates, samples, rows
    y = generator.normal(size=5)
    deviation = regression.PRECISIONS**-0.5
    each = scipy.stats.norm.logpdf(
        y, samples[:, None], deviation[:, None, None]
    )  # candidates, precisions, samples, rows
    arrays = samples.astype(np.float32), y.astype(np.float32)
    mixture = jax.jit(regression.mixture)(*arrays)
    expected = scipy.special.logsumexp(each, axis=2) - np.log(7)
    np.testing.assert_allclose(mixture.log_density, expected, rtol=1e-4, atol=1e-4)
    one = regression.one_gaussian(arrays[0], deviation[:, None, None] ** 2, arrays[1])
    total = samples.var(axis=1)[:, None] + deviation[:, None] ** 2
    expected = scipy.stats.norm.logpdf(y, samples.mean(axis=1)[:, None], np.sqrt(total))
    np.testing.assert_allclose(one.log_density, expected, rtol=1e-4, atol=1e-4)
    for prediction in (mixture, one):
        error = np.square(samples.mean(axis=1) - y)
        np.testing.assert_allclose(prediction.squared_error, error, rtol=1e-4, atol=1e-5)


SHORT = argparse.Namespace(
    rate=0.5,
    samples=4,
    train_size=40,
    label_noise=0.0,
    width=8,
    steps=3,
    batch_size=8,
    learning_rate=1e-2,
    seeds=2,
    seed=0,
)


@pytest.fixture(scope="module")
def runs(active_learning):
    return active_learning.start(SHORT)


@jax.jit
def one_of(runs, acquisition):
    return jax.tree.map(lambda leaf: leaf[acquisition, 1], runs)


def test_active_learning_starts_with_two_of_each_digit_in_all_acquisitions(active_learning, runs):
    first = np.asarray(runs.rows)[..., : active_learning.FIRST]
    for acquisition in range(3):
        run = one_of(runs, acquisition)
        assert run.acquisition == acquisition
        labels = np.asarray(run.data.train.labels)[first[acquisition, 1]]
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, 2))
        np.testing.assert_array_equal(first[acquisition], first[0])
    assert (first[0, 0] != first[0, 1]).any()


@pytest.mark.examples
@jax.numpy_dtype_promotion("standard")  # optax promotes
def test_active_learning_appends_the_images_of_the_largest_scores(active_learning, runs):
    network = active_learning.train_mlp.nnx_network(SHORT.width, SHORT.rate)

    @jax.jit
    def play(run):
        rows, params, _ = active_learning.play(SHORT, network, run, 20)
        key = active_learning.at_site(jax.random.fold_in(run.key, 20), "round")
        return rows, active_learning.score(SHORT, network, run, key, params)

    chosen = []
    for acquisition in range(3):
        run = one_of(runs, acquisition)
        rows, scores = map(np.array, play(run))
        np.testing.assert_array_equal(rows[:20], run.rows[:20])
        assert len(set(rows[:30].tolist())) == 30
        left_over = np.setdiff1d(np.arange(1000), rows[:30])
        assert scores[rows[20:30]].min() >= scores[left_over].max()
        chosen.append(frozenset(rows[20:30].tolist()))
    assert len(set(chosen)) == 3


@pytest.mark.examples
@jax.numpy_dtype_promotion("standard")
def test_active_learning_trains_on_labelled_images_alone(active_learning, runs):
    network = active_learning.train_mlp.nnx_network(SHORT.width, SHORT.rate)
    run = one_of(runs, 0)
    samples = run.data.train
    seen = np.isin(np.arange(1000), run.rows[:20])

    @jax.jit
    def trained(labels):
        changed = run._replace(data=run.data._replace(train=samples._replace(labels=labels)))
        return active_learning.train(SHORT, network, changed, jax.random.key(1), 20)

    def same(first, second):
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return all((a == b).all() for a, b in pairs)

    wrong = (samples.labels + 1) % 10
    params = trained(samples.labels)
    assert same(trained(jnp.where(seen, samples.labels, wrong)), params)
    assert not same(trained(jnp.where(seen, wrong, samples.labels)), params)
