import functools
import re
import sys

import jax
import numpy as np
import pytest
from cheap import normal
from example_runs import (
    assert_is_picture,
    error_of,
    last_digest,
    load,
    run_example,
    run_here,
    run_twice,
)
from flax import nnx

MLP = ["--steps=20", "--width=8", "--seeds=2", "--train-size=50", "--batch-size=16"]
CNN = ["--steps=2", "--width=4", "--depth=1", "--seeds=2", "--train-size=32", "--batch-size=8"]
TRANSFORMER = ["--steps=20", "--width=16", "--layers=1", "--heads=2", "--context=16"]
TRANSFORMER += ["--batch-size=4", "--train-chars=4000", "--sample-chars=40"]


def losses(text):
    """Returns the rows of numbers in the table of losses."""
    rows = re.findall(r"(no dropout|dropout) +│ (\d\.\d{3}) +│ (\d\.\d{3}) +│ (\d\.\d{3})", text)
    assert [row[0] for row in rows] == ["no dropout", "dropout"], text
    return rows


def test_how_dropout_works_prints_its_table_and_draws_its_picture(tmp_path):
    text = run_example("how_dropout_works.py", "--keys", 1000, "--output", tmp_path / "new")
    for row in ("evaluation", "masked only", "masked and scaled"):
        assert row in text
    assert "0.3999939" in text
    assert "all checks passed" in text
    assert_is_picture(tmp_path / "new" / "how_dropout_works.png")


@pytest.mark.examples
@pytest.mark.parametrize("options", [("--rate", 0.9, "--units", 1), ("--rate", 1e-9, "--keys", 2)])
def test_how_dropout_works_at_extreme_settings(options, tmp_path):
    run_here("how_dropout_works.py", "--keys", 500, *options, "--output", tmp_path)
    assert_is_picture(tmp_path / "how_dropout_works.png")


def test_how_dropout_works_says_how_to_get_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # installed or not, the import fails
    with pytest.raises(SystemExit, match="pip install torch"):
        run_here("how_dropout_works.py", "--torch", "--output", tmp_path)


@pytest.mark.examples
def test_train_mlp_gives_the_same_parameters_in_another_process_and_others_for_another_seed(
    tmp_path,
):
    text = run_twice("train_mlp.py", *MLP, "--output", tmp_path)
    assert "test accuracy" in text
    assert "50 training samples" in text
    assert_is_picture(tmp_path / "train_mlp.png")
    other = run_here("train_mlp.py", *MLP, "--seed=1", "--output", tmp_path)
    assert last_digest(other) != last_digest(text)


@pytest.fixture(scope="module")
def linen_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("linen")
    return run_here("train_mlp.py", *MLP, "--api=linen", "--output", output), output


@pytest.mark.examples
def test_train_mlp_does_the_same_with_linen(linen_run):
    text, output = linen_run
    assert "test accuracy" in text
    assert_is_picture(output / "train_mlp.png")


@pytest.mark.examples
def test_rate_schedules_compares_them_with_the_pair_of_train_mlp(linen_run, tmp_path, monkeypatch):
    schedules = load("rate_schedules")
    make = schedules.make_schedules
    some = ["no dropout", "constant", "early"]
    monkeypatch.setattr(
        schedules, "make_schedules", lambda options: {name: make(options)[name] for name in some}
    )
    text = run_here("rate_schedules.py", *MLP, "--cutoff-step=10", "--output", tmp_path)
    assert "cutoff at 10" in text
    assert_is_picture(tmp_path / "rate_schedules.png")

    def rows(text):
        return dict(re.findall(r"│ (\w[\w ]*\w) +│ (\d.*%) ", text))

    scheduled, fixed = rows(text), rows(linen_run[0])
    assert list(scheduled) == some
    # A schedule that does not change makes the same training as a plain number.
    assert scheduled["no dropout"] == fixed["no dropout"]
    assert scheduled["constant"] == fixed["dropout"]


@pytest.mark.examples
def test_train_cnn_compares_regularisers(tmp_path, monkeypatch):
    train_cnn = load("train_cnn")
    some = {name: train_cnn.SETTINGS[name] for name in ("none", "drop_block", "all three")}
    monkeypatch.setattr(train_cnn, "SETTINGS", some)
    text = run_here("train_cnn.py", *CNN, "--output", tmp_path)
    accuracies = re.findall(r"│ (\w[\w ]*\w) +│ \d.*% +│ \d.*% ", text)
    assert accuracies == list(some)
    differences = re.findall(r"│ (\w[\w ]*\w) +│ [+-].* points +│ [+-]", text)
    assert differences == accuracies[1:]
    assert_is_picture(tmp_path / "train_cnn.png")


@pytest.mark.examples
def test_train_faster_compares_times_and_draws_them(tmp_path):
    small = ["--steps=4", "--width=8", "--heads=2", "--depth=3", "--seeds=1", "--batch-size=8"]
    text = run_here("train_faster.py", *small, "--output", tmp_path)
    for kind in ("no dropout", "drop_path", "Stochasti", "RouteToke"):
        assert kind in text
    assert last_digest(text)
    assert_is_picture(tmp_path / "train_faster.png")


def test_the_convolution_of_train_cnn_is_one():
    train_cnn = load("train_cnn")
    layer = train_cnn.Conv(2, 5, nnx.Rngs(0))
    x = normal(3, 8, 6, 2)
    kernel = layer.kernel[...].reshape(3, 3, 2, 5)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.examples
def test_sparse_digits_prunes_and_compares_in_pairs():
    settings = ["--steps=5", "--width=4", "--seeds=2", "--train-size=40", "--batch-size=8"]
    text = run_here("sparse_digits.py", *settings, "--validate")
    assert re.search(r"variational +│ .*% +│ .*% +│ \d+ \(\d+, \d+, \d+\)", text), text
    assert re.search(r"validation accuracy pruned minus without noise, .* [+-].* ± .* points", text)
    assert re.search(r"weights pruned: \d+\.\d%", text)


@pytest.mark.examples
def test_gallery_has_a_panel_for_every_function(tmp_path):
    assert "24 panels" in run_here("gallery.py", "--output", tmp_path)
    assert_is_picture(tmp_path / "gallery.png")


@pytest.fixture(scope="module")
def transformer_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("transformer")
    return run_here("train_transformer.py", *TRANSFORMER, "--output", output), output


@pytest.mark.examples
def test_train_transformer_compares_losses_and_draws_them(transformer_run):
    text, output = transformer_run
    assert losses(text)
    assert "4000 characters for training, 2000 held out" in text
    assert_is_picture(output / "train_transformer.png")


@pytest.mark.examples
def test_train_transformer_with_the_attention_of_flax(transformer_run, tmp_path):
    text = run_here("train_transformer.py", *TRANSFORMER, "--attention=flax", "--output", tmp_path)
    assert "attention: flax" in text
    plain, dropped = losses(text)
    other_plain, other_dropped = losses(transformer_run[0])
    # The same function without dropout, up to rounding; other masks with it.
    np.testing.assert_allclose(np.float64(plain[1:]), np.float64(other_plain[1:]), atol=2e-3)
    assert dropped != other_dropped
    assert_is_picture(tmp_path / "train_transformer.png")


@pytest.mark.parametrize(
    ("example", "option", "value"),
    [
        ("how_dropout_works", "--rate", "1"),
        ("how_dropout_works", "--units", "many"),
        ("train_mlp", "--rate", "1.5"),
        ("train_mlp", "--label-noise", "nan"),
        ("train_mlp", "--train-size", "1797"),
        ("train_mlp", "--output", __file__),
        ("rate_schedules", "--cutoff-step", "0"),
        ("train_cnn", "--block-size", "9"),
        ("gallery", "--rate", "0.99"),
        ("train_transformer", "--rate", "1"),
        ("train_transformer", "--train-chars", "12"),
        ("train_transformer", "--temperature", "inf"),
    ],
)
def test_bad_options_are_named(example, option, value, capsys):
    assert error_of(example, option, value) == 2
    assert f"argument {option}: got {value}, pass " in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--heads", "3"), ("--context", "20000")])
def test_options_that_do_not_fit_others_are_named(option, value, tmp_path, capsys):
    assert error_of("train_transformer", option, value, "--output", tmp_path) == 2
    assert f"argument {option}: got {value}, pass " in capsys.readouterr().err


def test_train_transformer_says_how_much_text_there_is(tmp_path):
    error = error_of("train_transformer", "--train-chars", 10**9, "--output", tmp_path)
    assert "--train-chars 1000000000 is more than the standard library here has" in error


def test_digits_have_wrong_labels_in_training_alone(key):
    digits = load("_digits")
    pool, test = digits.load()
    assert not set(map(bytes, np.asarray(pool.images))) & set(map(bytes, np.asarray(test.images)))
    draw = jax.jit(functools.partial(digits.draw, key, pool, test, 1000))
    right, noisy = draw(0.0), draw(0.3)
    np.testing.assert_array_equal(noisy.test.labels, test.labels)
    np.testing.assert_array_equal(noisy.train.images, right.train.images)
    assert 0.25 < (noisy.train.labels != right.train.labels).mean() < 0.35
    assert set(np.unique(noisy.train.labels)) == set(range(10))
    np.testing.assert_allclose(noisy.train.images.mean(axis=0), 0, atol=1e-5)
    # Back to pixels: the test images went through the same map, which the training images made.
    scale = pool.images.std()
    np.testing.assert_allclose(
        noisy.test.images * scale + pool.images.mean(axis=0, keepdims=True), test.images, atol=1e-4
    )
    assert jax.tree.map(np.shape, right) == jax.tree.map(np.shape, noisy)
