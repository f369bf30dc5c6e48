import re

import jax
import numpy as np
import pytest
from example_runs import EXAMPLES, error_of, last_digest, load, run, run_example
from flax import nnx

# Installed torch or not, the import fails.
WITHOUT_TORCH = """
import os, runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as `python script` does
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Nearly all of the time of a short run goes into compiling: optimizing would double it.
COMPILE_QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def train_shortly(output, *options, example="train_mlp.py"):
    settings = ["--steps=20", "--width=8", "--seeds=2", "--train-size=50", "--batch-size=16"]
    return run_example(example, *settings, "--output", output, *options, **COMPILE_QUICKLY)


def train_transformer_shortly(output, *options):
    settings = ["--steps=20", "--width=16", "--layers=1", "--heads=2", "--context=16"]
    settings += ["--batch-size=4", "--train-chars=4000", "--sample-chars=40"]
    name = "train_transformer.py"
    return run_example(name, *settings, "--output", output, *options, **COMPILE_QUICKLY)


def losses(text):
    """Returns the rows of numbers in the table of losses."""
    rows = re.findall(r"(no dropout|dropout) +│ (\d\.\d{3}) +│ (\d\.\d{3}) +│ (\d\.\d{3})", text)
    assert [row[0] for row in rows] == ["no dropout", "dropout"], text
    return rows


def assert_is_picture(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


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
    run_example("how_dropout_works.py", "--keys", 500, *options, "--output", tmp_path)
    assert_is_picture(tmp_path / "how_dropout_works.png")


def test_how_dropout_works_says_how_to_get_torch(tmp_path):
    script = EXAMPLES / "how_dropout_works.py"
    result = run("-c", WITHOUT_TORCH, script, "--torch", "--output", tmp_path)
    assert result.returncode == 1
    assert "pip install torch" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def nnx_output(tmp_path_factory):
    return train_shortly(tmp_path_factory.mktemp("nnx"))


@pytest.mark.examples
def test_train_mlp_gives_the_same_parameters_in_another_process(nnx_output, tmp_path):
    again = train_shortly(tmp_path)
    assert "test accuracy" in again
    assert "50 training samples" in again
    assert last_digest(again) == last_digest(nnx_output)
    assert_is_picture(tmp_path / "train_mlp.png")


@pytest.mark.examples
def test_train_mlp_gives_other_parameters_for_another_seed(nnx_output, tmp_path):
    assert last_digest(train_shortly(tmp_path, "--seed", 1)) != last_digest(nnx_output)


@pytest.mark.examples
def test_train_mlp_does_the_same_with_linen(tmp_path):
    first, second = (train_shortly(tmp_path, "--api", "linen") for _ in range(2))
    assert "test accuracy" in first
    assert last_digest(first) == last_digest(second)
    assert_is_picture(tmp_path / "train_mlp.png")


@pytest.mark.examples
def test_rate_schedules_compares_them_with_the_pair_of_train_mlp(tmp_path):
    first, second = (
        train_shortly(tmp_path, "--cutoff-step", 10, example="rate_schedules.py") for _ in range(2)
    )
    assert last_digest(first) == last_digest(second)
    assert "cutoff at 10" in first
    assert_is_picture(tmp_path / "rate_schedules.png")

    def rows(text):
        return dict(re.findall(r"│ (\w[\w ]*\w) +│ (\d.*%) ", text))

    scheduled, fixed = rows(first), rows(train_shortly(tmp_path, "--api", "linen"))
    assert list(scheduled) == ["no dropout", "constant", "early", "late", "curriculum"]
    # A schedule that does not change makes the same training as a plain number.
    assert scheduled["no dropout"] == fixed["no dropout"]
    assert scheduled["constant"] == fixed["dropout"]


def train_cnn_shortly(output, *options):
    settings = ["--steps=2", "--width=4", "--depth=1", "--seeds=2", "--train-size=32"]
    settings += ["--batch-size=8"]
    return run_example("train_cnn.py", *settings, "--output", output, *options, **COMPILE_QUICKLY)


@pytest.mark.examples
def test_train_cnn_compares_each_regulariser_and_repeats_itself(tmp_path):
    first, second = (train_cnn_shortly(tmp_path) for _ in range(2))
    assert last_digest(first) == last_digest(second)
    accuracies = re.findall(r"│ (\w[\w ]*\w) +│ \d.*% +│ \d.*% ", first)
    assert accuracies == ["none", "drop_block", "spatial_dropout", "drop_path", "all three"]
    differences = re.findall(r"│ (\w[\w ]*\w) +│ [+-].* points +│ [+-]", first)
    assert differences == accuracies[1:]
    assert_is_picture(tmp_path / "train_cnn.png")


def test_the_convolution_of_train_cnn_is_one(key):
    train_cnn = load("train_cnn")
    layer = train_cnn.Conv(2, 5, nnx.Rngs(0))
    x = jax.random.normal(key, (3, 8, 6, 2))
    kernel = layer.kernel[...].reshape(3, 3, 2, 5)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.examples
def test_sparse_digits_prunes_and_compares_in_pairs():
    settings = ["--steps=5", "--width=4", "--seeds=2", "--train-size=40", "--batch-size=8"]
    text = run_example("sparse_digits.py", *settings, "--validate", **COMPILE_QUICKLY)
    assert re.search(r"variational +│ .*% +│ .*% +│ \d+ \(\d+, \d+, \d+\)", text), text
    assert re.search(r"validation accuracy pruned minus without noise, .* [+-].* ± .* points", text)
    assert re.search(r"weights pruned: \d+\.\d%", text)


@pytest.mark.examples
def test_gallery_has_a_panel_for_every_function(tmp_path):
    assert "24 panels" in run_example("gallery.py", "--output", tmp_path, **COMPILE_QUICKLY)
    assert_is_picture(tmp_path / "gallery.png")


@pytest.fixture(scope="module")
def transformer_output(tmp_path_factory):
    return train_transformer_shortly(tmp_path_factory.mktemp("transformer"))


@pytest.mark.examples
def test_train_transformer_gives_the_same_parameters_in_another_process(
    transformer_output, tmp_path
):
    again = train_transformer_shortly(tmp_path)
    assert "4000 characters for training, 2000 held out" in again
    assert losses(again) == losses(transformer_output)
    assert last_digest(again) == last_digest(transformer_output)
    assert_is_picture(tmp_path / "train_transformer.png")


@pytest.mark.examples
def test_train_transformer_with_the_attention_of_flax(transformer_output, tmp_path):
    text = train_transformer_shortly(tmp_path, "--attention", "flax")
    assert "attention: flax" in text
    plain, dropped = losses(text)
    other_plain, other_dropped = losses(transformer_output)
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
    right, noisy = (digits.draw(key, pool, test, 1000, noise) for noise in (0.0, 0.3))
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
