"""The uncertainty example, in a short form of its run, and its own arithmetic."""

import importlib
import re

import numpy as np
import pytest
from example_runs import EXAMPLES, assert_is_picture, run_here

FIGURES = ["uncertainty_band.png", "uncertainty_rejection.png", "uncertainty_turn.png"]
SHORT = ["--steps=100", "--seeds=2", "--width=32", "--samples=4", "--many=1000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The printed text, and where the figures are."""
    output = tmp_path_factory.mktemp("uncertainty")
    return run_here("uncertainty.py", *SHORT, "--output", output), output


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # they import each other, as scripts do
    return importlib.import_module("uncertainty")


def rows(text, name, numbers):
    """The numbers before ± in the rows that contain a name, of so many numbers each."""
    found = []
    for line in text.splitlines():
        values = [float(value) for value in re.findall(r"(-?\d+\.\d+) ±", line)]
        if name in line and len(values) == numbers:
            found.append(values)
    return found


@pytest.mark.examples
def test_the_figures_are_drawn(run):
    _, output = run
    assert sorted(path.name for path in output.iterdir()) == FIGURES
    for name in FIGURES:
        assert_is_picture(output / name)


@pytest.mark.examples
def test_networks_of_few_steps_already_know_right_from_turned_digits(run):
    """After 100 steps; chance is an accuracy of 10 % and an area of 50 %."""
    text, _ = run
    for prediction in ("no dropout", "off", "MC"):
        upright, _, by_60_degrees, _ = rows(text, f"│ {prediction} ", 3)
        assert upright[0] > 50
        assert by_60_degrees[0] < upright[0] - 20
    (by_turning_and_unseen,) = rows(text, "MC: entropy", 4)[:1]
    assert by_turning_and_unseen[0] > 55
    assert by_turning_and_unseen[3] > 55


@pytest.mark.examples
def test_accuracy_rises_when_the_doubtful_are_rejected_and_most_when_the_errors_are(run):
    text, _ = run
    _, by_entropy = rows(text, "MC: entropy", 4)
    (by_errors,) = rows(text, "knowing MC's errors", 4)
    assert by_entropy[0] == by_errors[0]
    assert by_entropy[0] < by_entropy[1] < by_entropy[2]
    assert by_errors[3] > by_entropy[3] + 5


@pytest.mark.examples
def test_the_text_says_where_monte_carlo_loses(run):
    text, _ = run
    assert re.search(r"^better: .+\nworse: .+$", text, re.MULTILINE)


def test_the_rejection_curve_of_four_images(example):
    doubts = np.array([[0.1, 0.4, 0.2, 0.3]])
    right = np.array([[True, False, True, False]])
    curve = example.accuracies_of_rest(doubts, right)
    np.testing.assert_allclose(curve, [[1 / 2, 2 / 3, 1, 1]])


def test_separation_is_one_where_all_outside_are_doubted_more_and_a_half_where_alike(example):
    inside = {"sure": np.array([[0.1, 0.2], [0.5, 0.6]])}
    outside = {"sure": np.array([[0.3, 0.9, 0.7], [0.6, 0.5, 0.5]])}
    np.testing.assert_allclose(example.separation(inside, outside)["sure"], [1, 5 / 12])


def test_a_turn_by_a_right_angle_moves_each_grey(example):
    image = np.arange(64.0).reshape(8, 8)
    (turned,) = example.turned(image.reshape(1, 64), 90)
    as_square = np.asarray(turned).reshape(8, 8)
    assert any(np.allclose(as_square, np.rot90(image, turns), atol=1e-4) for turns in (1, 3))


def test_the_entropy_of_a_mean_of_few_lacks_what_the_formula_says(example):
    """Of 40,000 means of 30 Dirichlet distributions; the formula's next term is below a tenth."""
    rng, count = np.random.default_rng(0), 30
    p = rng.dirichlet([1.0, 2.0, 3.0], size=(40_000, count))
    mean, variance = np.array([1, 2, 3]) / 6, np.array([5, 8, 9]) / (36 * 7)
    q = p.mean(axis=1)
    lacking = (q * np.log(q)).sum(axis=-1).mean() - (mean * np.log(mean)).sum()
    by_formula = example.error_slope(mean, variance) / count
    assert abs(lacking / by_formula - 1) < 0.1
