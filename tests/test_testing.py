"""Every assertion accepts what has its property, and rejects controls that lack it."""

import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from example_runs import environment
from jax import lax
from scipy import stats

import jdropout
import jdropout.nnx
from jdropout.testing import (
    _bits,
    _expectation,
    _explain,
    assert_backward_uses_forward_mask,
    assert_reproducible,
    assert_unbiased,
    mask_fingerprint,
)

ROOT = pathlib.Path(__file__).parent.parent
KEY = jax.random.key(2026)
WORDS = [7, 2026]


@pytest.fixture(autouse=True)
def unexplained(monkeypatch):
    """Failures are not recorded, which would compile every control twice more."""
    monkeypatch.setattr(_explain, "MOST_EQUATIONS", 0)


def fails(text):
    return pytest.raises(AssertionError, match=text)


# --- fingerprints -------------------------------------------------------------------------

FINGERPRINTS = [
    ((0.5, (2, 8)), {}, "79a5b48b73fb06a8"),
    ((0.1, (37, 10)), {}, "ea1a3bf722e17c10"),
    ((0.1, (37, 10)), dict(precision=32), "ea1a3bf722e17c10"),
    ((1e-5, (64, 4096)), {}, "0272fee91a4cf7d0"),
    ((0.5, (16,)), {}, "b66b8f198478d52f"),
    ((0.5, ()), {}, "7648eb81c4e9fef7"),
    ((0.3, (3, 6, 5)), dict(broadcast_dims=(0, -1)), "f7468b8d9e86f124"),
    ((0.3, (5, 3)), dict(start=(6, 1), global_shape=(11, 4)), "c864a1258f5565cd"),
]


@pytest.mark.parametrize(("args", "options", "known"), FINGERPRINTS)
def test_fingerprints_are_the_known_ones(args, options, known):
    assert mask_fingerprint(jnp.array(WORDS, jnp.uint32), *args, **options) == known


@pytest.mark.parametrize(("args", "options", "known"), FINGERPRINTS)
def test_fingerprints_of_the_numpy_twin_are_the_same(args, options, known, monkeypatch):
    def twin(key, rate, shape, global_shape=None, **options):
        return law_twin.keep_mask(key, rate, shape, whole=global_shape, **options)

    monkeypatch.setattr(_bits, "keep_mask", twin)
    assert mask_fingerprint(WORDS, *args, **options) == known


def test_fingerprints_take_keys_of_every_kind():
    words = jnp.array(WORDS, jnp.uint32)
    known = mask_fingerprint(words, 0.1, (37, 10))
    assert mask_fingerprint(jax.random.wrap_key_data(words), 0.1, (37, 10)) == known
    assert mask_fingerprint(np.array(WORDS, np.uint32), 0.1, (37, 10)) == known
    assert len(mask_fingerprint(jax.random.key(0, impl="rbg"), 0.1, (37, 10))) == 16


def test_fingerprints_tell_shapes_and_single_bits_apart(key, monkeypatch):
    bits = np.asarray(jdropout.keep_mask(key, 0.5, (4, 5)))
    masks = [bits.reshape(shape) for shape in ((4, 5), (5, 4), (20,), (1, 20), (20, 1))]
    masks += [bits ^ (np.arange(20).reshape(4, 5) == index) for index in range(20)]
    masks += [np.zeros(shape, bool) for shape in ((0,), (1,), (8,), (12,), (1, 2))]
    monkeypatch.setattr(_bits, "keep_mask", lambda key, rate, mask, **options: mask)
    assert len({mask_fingerprint(key, 0.5, mask) for mask in masks}) == len(masks)


# --- expectations -------------------------------------------------------------------------


def mask(key, x, rate=0.1):
    return jdropout.keep_mask(key, rate, x.shape)


def noisy(key, x):
    return x * (1 + jax.random.uniform(key, x.shape, minval=-0.5, maxval=0.5))


def flax_style(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


def module(key, x):
    return jdropout.nnx.Dropout(0.5)(x, deterministic=False, rngs=key)


def ours(rate, **options):
    return lambda key, x: jdropout.dropout(key, x, rate, **options)


ONES = jnp.ones((32, 32))
MIXED = jnp.linspace(0.5, 1.5, 1024).reshape(32, 32) * jnp.array([1.0, -1.0] * 16)[None]

UNBIASED = {
    "dropout": (ours(0.1), MIXED, dict(rate=0.1)),
    "32 bits": (ours(0.001), ONES, dict(rate=0.001)),
    "module": (module, ONES, dict(rate=0.5)),
    "another library": (flax_style, MIXED, dict(rate=0.1)),
    "shared fates": (
        ours(0.1, broadcast_dims=(0,)),
        MIXED,
        dict(rate=0.1, broadcast_dims=(0,), tolerance=0.01),
    ),
    "noise": (noisy, MIXED, dict(rate=0.1)),
    "bfloat16": (ours(0.1), MIXED.astype(jnp.bfloat16), dict(rate=0.1)),
    "one element": (ours(0.5), jnp.float32(-3), dict(rate=0.5, tolerance=0.01)),
    "identity": (lambda key, x: x, MIXED, dict(rate=0)),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_functions_are_accepted(name):
    fn, x, options = UNBIASED[name]
    assert_unbiased(fn, x, key=KEY, **options)


@pytest.mark.parametrize("kind", ["raw", "rbg"])
def test_unbiased_functions_get_keys_of_the_kind_that_is_given(kind):
    key = jnp.array([1, 2], jnp.uint32) if kind == "raw" else jax.random.key(0, impl="rbg")

    def fn(received, x):
        assert received.dtype == key.dtype
        return jdropout.dropout(received, x, 0.5)

    assert_unbiased(fn, ONES, key=key, rate=0.5, tolerance=0.01)


ALL, ELEMENT, CALL = "mean over all elements", "have a mean over the keys", "elements of one call"
BIASED = {
    "no scale": (lambda k, x: jnp.where(mask(k, x), x, 0), (ALL, ELEMENT, CALL)),
    "scale of another rate": (lambda k, x: jnp.where(mask(k, x), x / 0.899, 0), (ALL,)),
    "8-bit threshold": (
        lambda k, x: jnp.where(jax.random.bits(k, x.shape, jnp.uint8) < 230, x / 0.9, 0),
        (ALL,),
    ),
    "one mask for all keys": (lambda k, x: jdropout.dropout(KEY, x, 0.1), (ALL, ELEMENT)),
    "one element's own scale": (lambda k, x: ours(0.1)(k, x).at[3, 4].multiply(0.95), (ELEMENT,)),
    "one mask for all rows": (ours(0.1, broadcast_dims=(0,)), (CALL,)),
    "a higher rate": (ours(0.5), (CALL,)),
    "one NaN": (lambda k, x: ours(0.1)(k, x).at[3, 4].set(jnp.nan), (ALL, ELEMENT, CALL)),
}


@pytest.mark.parametrize("name", BIASED)
def test_biased_functions_are_rejected_for_what_they_lack(name):
    fn, reasons = BIASED[name]
    with fails("mean 1") as caught:
        assert_unbiased(fn, MIXED, key=KEY, rate=0.1)
    found = {reason for reason in (ALL, ELEMENT, CALL) if reason in str(caught.value)}
    assert found >= set(reasons)
    assert ALL in reasons or ALL not in found


def test_a_biased_element_is_named():
    def never_dropped(key, x):
        return jnp.where(mask(key, x).at[3, 4].set(True), x / 0.9, 0)

    with fails(r"1 of 1024 elements .* 1\.11\d* at \(3, 4\)"):
        assert_unbiased(never_dropped, MIXED, key=KEY, rate=0.1)


def test_a_bias_of_the_tolerance_is_found_and_a_tenth_of_it_is_not():
    rate, bias = 0.9, -0.03
    options = dict(key=KEY, rate=rate, tolerance=abs(bias))
    with fails(ALL):
        assert_unbiased(lambda k, x: jdropout.dropout(k, x, rate) * (1 + bias), ONES, **options)
    assert_unbiased(lambda k, x: jdropout.dropout(k, x, rate) * (1 + bias / 10), ONES, **options)


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("level", [0.5, 1e-3, 1e-9])
def test_bounds_hold_for_the_exact_distributions(rate, level):
    """No chance involved: tails of the binomial and the normal distribution."""
    noise = _expectation._Noise.of_dropout(rate)
    for count in (1, 10, 1000, 10**6, 10**9):
        off = noise.bound(count, level)
        kept = stats.binom(count, 1 - rate)
        many, few = count * (1 - rate) * (1 + off), count * (1 - rate) * (1 - off)
        assert kept.sf(math.ceil(many) - 1) + kept.cdf(math.floor(few)) <= level or rate == 0
        deviation = math.sqrt(rate / (1 - rate) / count)
        assert 2 * stats.norm.sf(off / deviation if deviation else np.inf) <= level
        assert math.isclose(noise.sample_size(off, level), count, rel_tol=1e-9)


def test_the_number_of_keys_is_that_of_the_formula():
    v = 0.1 / 0.9
    keys = (8 * v + 4 * 1e-3 / 3) * math.log(6 / 1e-6) / 1e-3**2 / 1024
    with fails("mean 1") as caught:
        assert_unbiased(BIASED["no scale"][0], ONES, key=KEY, rate=0.1)
    used = int(str(caught.value).split("With ")[1].split(" keys")[0])
    assert keys <= used <= keys * 1.001 + 256


def test_a_function_is_traced_for_its_shape_and_for_all_keys():
    traces = []

    def fn(key, x):
        traces.append(x.shape)
        return jdropout.dropout(key, x, 0.1)

    assert_unbiased(fn, ONES, key=KEY, rate=0.1)
    assert traces == [(32, 32)] * 2


@pytest.mark.parametrize(
    ("fn", "x", "options", "error", "text"),
    [
        (ours(0.1), ONES.at[0, 0].set(0), {}, ValueError, "without zeros"),
        (ours(0.1), ONES * jnp.inf, {}, ValueError, "x must be finite"),
        (ours(0.1), jnp.ones((0, 4)), {}, ValueError, "x must have elements, got shape (0, 4)"),
        (ours(0.1), jnp.ones(3, int), {}, TypeError, "got dtype int32"),
        (ours(0.1), "x", {}, TypeError, "x must be an array, got str"),
        (ours(0.1), ONES, dict(key=None), ValueError, "key is None"),
        (ours(0.1), ONES, dict(key=jax.random.split(KEY)), ValueError, "keys of shape (2,)"),
        (ours(0.1), ONES, dict(rate=1.0), ValueError, "rate must be below 1, got 1.0"),
        (ours(0.1), ONES, dict(rate=-0.1), ValueError, "rate must be in [0, 1], got -0.1"),
        (ours(0.1), ONES, dict(rate=jnp.float32(0.1)), TypeError, "float(rate)"),
        (ours(0.1), ONES, dict(broadcast_dims=(2,)), ValueError, "broadcast_dims has axis 2"),
        (ours(0.1), ONES, dict(tolerance=0), ValueError, "tolerance must be between 0 and 1"),
        (ours(0.1), ONES, dict(tolerance="x"), TypeError, "tolerance must be a number, got 'x'"),
        (ours(0.1), ONES, dict(tolerance=1e-8), ValueError, "tolerance of 1e-08 takes"),
        (ours(0.1), ONES, dict(false_alarm_rate=1), ValueError, "false_alarm_rate must be"),
        (lambda k, x: x[:2], ONES, {}, ValueError, "of x's shape (32, 32), got shape (2, 32)"),
        (lambda k, x: x > 0, ONES, {}, ValueError, "dtype bool"),
        (lambda k, x: (x, x), ONES, {}, ValueError, "fn(key, x) must be one array, got tuple"),
    ],
)
def test_what_shows_nothing_about_the_mean_is_an_error(fn, x, options, error, text):
    with pytest.raises(error) as caught:
        assert_unbiased(fn, x, **(dict(key=KEY, rate=0.1) | options))
    assert text in str(caught.value)


# --- the backward pass --------------------------------------------------------------------


def drop(x):
    return jdropout.dropout(KEY, x, 0.5)


FAITHFUL = {
    "scan": lambda x: lax.scan(lambda c, _: (drop(c), None), x, length=1)[0],
    "another library": lambda x: flax_style(KEY, x),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_dropout_with_its_own_backward_pass_is_accepted(name):
    assert_backward_uses_forward_mask(jax.jit(FAITHFUL[name]), jnp.ones((8, 16)))


def test_a_backward_pass_in_another_dtype_is_accepted():
    layer = jax.jit(lambda x: jdropout.dropout(KEY, x, 0.1))
    assert_backward_uses_forward_mask(layer, jnp.ones((8, 16), jnp.bfloat16))


def with_backward(backward):
    """Dropout whose backward pass is some other function."""
    fn = jax.custom_vjp(drop)
    fn.defvjp(lambda x: (drop(x), None), lambda _, cotangent: (backward(cotangent),))
    return fn


def test_a_custom_backward_pass_with_the_same_mask_is_accepted():
    fn = with_backward(drop)
    assert_backward_uses_forward_mask(fn, jnp.ones((8, 16)), forward_mode=False)
    with pytest.raises(TypeError, match="forward-mode") as caught:
        assert_backward_uses_forward_mask(fn, jnp.ones((8, 16)))
    assert any("forward_mode=False" in note for note in caught.value.__notes__)


WRONG = {
    "another key": (lambda x: jdropout.dropout(jax.random.key(1), x, 0.5), "mask"),
    "no scale": (lambda x: jnp.where(mask(KEY, x, 0.5), x, 0), "scale"),
    "no mask": (lambda x: x, "mask"),
    "another scale": (lambda x: drop(x) * (1 + 1e-5), "scale"),
    "one element": (lambda x: drop(x).at[2, 8].set(0), "mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_backward_pass_with_another_mask_or_scale_is_rejected(name):
    backward, what = WRONG[name]
    assert drop(jnp.ones((8, 16)))[2, 8] != 0
    with fails(f"^the vjp of fn has not the {what} of fn: with ones"):
        assert_backward_uses_forward_mask(with_backward(backward), jnp.ones((8, 16)))


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, lambda f: lambda x: lax.map(f, x[None])[0]]
)
def test_a_backward_pass_with_another_mask_is_rejected_within_any_wrapper(wrap):
    fn = wrap(with_backward(WRONG["another key"][0]))
    with fails("has not the mask of fn"):
        assert_backward_uses_forward_mask(fn, jnp.ones((8, 16)))


@pytest.mark.parametrize("name", ["another key", "another scale"])
def test_a_tangent_with_another_mask_or_scale_is_rejected(name):
    tangent, what = WRONG[name]
    fn = jax.custom_jvp(drop)
    fn.defjvp(lambda primals, tangents: (drop(*primals), tangent(*tangents)))
    with fails(f"has not the {what} of fn"):
        assert_backward_uses_forward_mask(fn, jnp.ones((8, 16)))


def test_the_first_wrong_element_of_a_backward_pass_is_named():
    expected = r"in 1 of 128 elements, first at \(2, 8\): 0 instead of 2\."
    with fails(expected):
        assert_backward_uses_forward_mask(
            with_backward(WRONG["one element"][0]), jnp.ones((8, 16)), forward_mode=False
        )


def fresh_keys():
    """A function with a new mask at every call, as a stateful generator makes it."""
    numbers = iter(range(1000))
    return lambda x: jdropout.dropout(jax.random.key(next(numbers)), x, 0.5)


@pytest.mark.parametrize(
    ("fn", "x", "error", "text"),
    [
        (fresh_keys(), jnp.ones((8, 16)), ValueError, "with a fixed mask"),
        (lambda x: jnp.abs(drop(x)), jnp.ones((8, 16)), ValueError, "linear and elementwise"),
        (lambda x: drop(x) + 1, jnp.ones((8, 16)), ValueError, "linear and elementwise"),
        (lambda x: jnp.roll(drop(x), 1), jnp.ones((8, 16)), ValueError, "elementwise"),
        (lambda x: drop(x)[:4], jnp.ones((8, 16)), ValueError, "of x's shape (8, 16)"),
        (lambda x: (drop(x), 1), jnp.ones((8, 16)), ValueError, "must be one array, got tuple"),
        (lambda x: x, jnp.ones((8, 16)), ValueError, "keeps 128 of 128 elements"),
        (lambda x: 0 * x, jnp.ones((8, 16)), ValueError, "keeps 0 of 128 elements"),
        (drop, jnp.ones((0, 4)), ValueError, "keeps 0 of 0 elements"),
        (drop, jnp.ones((8, 16), int), TypeError, "got dtype int32"),
        (drop, [1.0], TypeError, "x must be an array, got list"),
    ],
)
def test_what_shows_nothing_about_a_backward_pass_is_an_error(fn, x, error, text):
    with pytest.raises(error) as caught:
        assert_backward_uses_forward_mask(fn, x)
    assert text in str(caught.value)


# --- trainings ----------------------------------------------------------------------------


def results(*values):
    """A training that returns one value after the other."""
    values = iter(values)
    return lambda: next(values)


def leaves():
    return {
        "params": [jnp.ones((2, 3)), np.zeros(4, np.float16), jnp.ones(3, jnp.bfloat16)],
        "keys": jax.random.split(KEY, 3),
        "rbg": jax.random.key(0, impl="rbg"),
        "loss": float("nan"),
        "steps": 7,
        "name": "run",
        "nothing": None,
        "empty": np.zeros((0, 3)),
    }


def test_equal_trees_are_reproducible_with_everything_that_they_may_hold():
    assert_reproducible(leaves, runs=3)
    signs = np.array([0.0, -0.0, np.nan, -np.nan, np.inf])
    assert_reproducible(lambda: signs)


def test_runs_are_as_many_as_asked_for_and_compile_anew_if_told_to():
    for clear_caches, compilations in ((False, 1), (True, 3)):
        calls, traces = [], []

        @jax.jit
        def step(x, traces=traces):
            traces.append(x)
            return x + 1

        def train(step=step, calls=calls):
            calls.append(None)
            return step(1.0)

        assert_reproducible(train, runs=3, clear_caches=clear_caches)
        assert len(calls) == 3
        assert len(traces) == compilations


def test_a_training_with_numpys_global_generator_is_rejected():
    def train():
        x = jnp.ones((4, 8))
        keep = np.random.random((4, 8)) < 0.5
        return {"w": jnp.where(keep, x, 0)}

    state = np.random.get_state()
    np.random.seed(0)
    with fails(r"in run 2, result\['w'\] differs in \d+ of 32 elements, first at \(\d, \d\): "):
        assert_reproducible(train)
    np.random.set_state(state)


def test_an_array_that_every_run_goes_on_with_is_rejected():
    weights = np.zeros(3)

    def train():
        weights[1] += 1  # in place: both runs return the same array
        return weights

    with fails(
        r"in run 2, result differs in 1 of 3 elements, first at \(1,\): 2.0, but 1.0 in run 1"
    ):
        assert_reproducible(train)


ONE = np.float32(1)
DIFFERENT = {
    "one bit": (ONE, np.nextafter(ONE, np.float32(2)), "1.0000001, but 1.0 in run 1"),
    "sign of zero": (np.float32(0), np.float32(-0.0), "-0.0, but 0.0 in run 1"),
    "NaN and number": (ONE, np.float32(np.nan), "nan, but 1.0"),
    "bits of NaN": (np.array([np.nan]), np.array([-np.nan]), "differs in 1 of 1"),
    "bfloat16": (jnp.bfloat16(1), jnp.bfloat16(1.0078125), "1.00781, but 1 in run 1"),
    "dtype": (np.ones(3), np.ones(3, np.float32), "has dtype float32 and shape (3,), but float64"),
    "shape": (np.ones((3, 1)), np.ones((1, 3)), "shape (1, 3), but float64 and (3, 1)"),
    "typed key": (KEY, jax.random.key(2), "differs in 1 of 2 elements, first at (1,): 2, but 2026"),
    "kind of key": (KEY, jax.random.key(2026, impl="rbg"), "has dtype key<rbg>"),
    "raw and typed key": (KEY, jax.random.key_data(KEY), "has dtype uint32"),
    "missing leaf": ({"a": 1, "b": 2}, {"a": 1}, "result['b'] is only there in run 1"),
    "further leaf": ([1], [1, 2], "result[1] is only there not in run 1"),
    "string": ("run", "ran", "result differs in 1 of 1 elements, first at (): ran, but run"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_first_difference_of_two_runs_is_named(name):
    first, second, text = DIFFERENT[name]
    with pytest.raises(AssertionError) as caught:
        assert_reproducible(results(first, second))
    assert text in str(caught.value)
    with fails("in run 3, "):
        assert_reproducible(results(first, first, second), runs=3)


@pytest.mark.parametrize(
    ("value", "runs", "error", "text"),
    [
        (1.0, 1, ValueError, "runs must be at least 2, got 1"),
        (1.0, 2.0, TypeError, "runs must be an integer, got 2.0"),
        (None, 2, ValueError, "train() returned no arrays"),
        ({}, 2, ValueError, "train() returned no arrays"),
        ({"model": object()}, 2, TypeError, "result['model'] must be an array, a number or a"),
        (np.array([None]), 2, TypeError, "got ndarray"),
    ],
)
def test_what_shows_nothing_about_a_training_is_an_error(value, runs, error, text):
    with pytest.raises(error) as caught:
        assert_reproducible(lambda: value, runs=runs)
    assert text in str(caught.value)


# --- the guide ----------------------------------------------------------------------------


def run_tests(path):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", path],
        env=environment(),
        cwd=path.parent,
        encoding="utf-8",
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.mark.examples
def test_the_guides_test_file_passes_as_it_is(tmp_path):
    path = tmp_path / "test_reproducible.py"  # where no settings of ours are found
    shutil.copyfile(ROOT / "examples" / "test_reproducible.py", path)
    result = run_tests(path)
    assert result.returncode == 0, result.stdout
    assert "7 passed" in result.stdout


def test_the_guide_shows_the_whole_file():
    text = (ROOT / "docs" / "testing.md").read_text()
    assert "```{literalinclude} ../examples/test_reproducible.py\n" in text


def test_the_module_needs_neither_flax_nor_pytest():
    code = "import sys, jdropout.testing; print({'flax', 'pytest'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], encoding="utf-8", capture_output=True, check=True
    )
    assert result.stdout == "set()\n"
