"""The port to NumPy, which is also the twin of the other tests."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import known_answers
import numpy as np
import pytest
from law_twin import PORTS, port

import jdropout

KEY = (0, 42)  # the words of jax.random.key(42)


STEPS = [*known_answers.STEPS, known_answers.strata]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_known_answers(step):
    step(port)


def test_it_needs_numpy_only():
    code = "import sys, jdropout_numpy; assert not {'jax', 'jdropout', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PORTS / "numpy")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_is_ours_in_both_passes(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 10, 7), dtype))
    y, pull = jax.vjp(lambda x: jdropout.dropout(jax.random.key(42), x, 0.3), x)
    np.testing.assert_array_equal(port.dropout(KEY, x, 0.3), y)
    np.testing.assert_array_equal(port.dropout(KEY, x, 0.3), pull(x)[0])
    assert port.dropout(KEY, x, 0.3).dtype == dtype


def test_fold_in_is_jaxs_and_split():
    key = jax.random.key(42)
    children = jax.random.key_data(jax.random.split(key, 3))
    for number in range(3):
        assert port.fold_in(KEY, number) == tuple(children[number].tolist())
    far = jax.random.key_data(jax.random.fold_in(key, 2**32 - 1))
    assert port.fold_in(KEY, 2**32 - 1) == tuple(far.tolist())


def test_of_equal_numbers_the_first_are_kept(monkeypatch):
    alternating = np.tile(np.array([1, 0], np.uint32), 500)
    monkeypatch.setattr(port, "uniform_numbers", lambda *arguments: alternating)
    indices = port.keep_indices(KEY, 0.25, 1000, groups=2)
    expected = [i for i in range(1000) if i % 2 or i % 500 < 250]
    assert indices.tolist() == expected


def test_evaluation_and_ends_of_the_rate():
    x = np.ones((4, 4), np.float32)
    assert port.dropout(None, x, 0.3, training=False) is x
    assert port.dropout(None, x, 0.0) is x
    assert not port.dropout(KEY, x, 1.0).any()
    assert port.effective_rate(0.1) == jdropout.effective_rate(0.1)
    assert port.keep_indices(None, 0.0, 4, groups=2).tolist() == [0, 1, 2, 3]
    for call, message in (
        (lambda: port.dropout(KEY, x, 1.5), "rate must be"),
        (lambda: port.dropout(None, x, 0.3), "key is missing"),
        (lambda: port.keep_mask(KEY, 0.3, (4,), precision=8), "precision must be"),
        (lambda: port.keep_indices(KEY, 0.5, 10, groups=3), "groups must divide"),
        (lambda: port.keep_indices(KEY, -0.5, 10), "rate must be"),
        (
            lambda: port.keep_indices(KEY, 0.5, 8, groups=2, start=(2,), global_shape=(16,)),
            "beginning of a group",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
