"""Bad input: the error names the argument and the value, and says what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jdropout

X = jnp.ones((4, 6))
KEY = jax.random.key(0)
RAW = jnp.array([1, 2], jnp.uint32)

CASES = {
    "rate above one": (dict(rate=1.5), ValueError, "rate must be in [0, 1], got 1.5"),
    "rate below zero": (dict(rate=-0.1), ValueError, "rate must be in [0, 1], got -0.1"),
    "rate NaN": (dict(rate=float("nan")), ValueError, "rate must be in [0, 1], got nan"),
    "rate infinite": (dict(rate=float("inf")), ValueError, "got inf"),
    "rate means dropping": (dict(rate=2), ValueError, "probability of dropping, not of keeping"),
    "rate bool": (dict(rate=True), TypeError, "got True, a boolean"),
    "rate numpy bool": (dict(rate=np.bool_(False)), TypeError, "a boolean"),
    "rate string": (dict(rate="0.5"), TypeError, "got '0.5' of type str"),
    "rate None": (dict(rate=None), TypeError, "got None of type NoneType"),
    "rate complex": (dict(rate=0.5 + 0j), TypeError, "of type complex"),
    "rate vector": (dict(rate=np.ones(3)), ValueError, "rate must be a scalar"),
    "rate JAX vector": (dict(rate=jnp.ones(3)), ValueError, "array of shape (3,)"),
    "rate vector fix": (dict(rate=jnp.ones(3)), ValueError, "jax.vmap"),
    "rate JAX integer": (dict(rate=jnp.int32(0)), TypeError, "dtype int32"),
    "rate JAX bool": (dict(rate=jnp.array(True)), TypeError, "dtype bool"),
    "rate JAX range": (dict(rate=jnp.float32(1.5)), ValueError, "got 1.5"),
    "rate JAX NaN": (dict(rate=jnp.float32(jnp.nan)), ValueError, "got nan"),
    "x integer": (dict(x=jnp.arange(3)), TypeError, "got dtype int32"),
    "x list": (dict(x=[1.0, 2.0]), TypeError, "x must be an array, got list"),
    "x None": (dict(x=None), TypeError, "x must be an array, got NoneType"),
    "x without a zero": (
        dict(x=jnp.ones(3, jnp.float8_e8m0fnu)),
        TypeError,
        "dtype with a zero, got float8_e8m0fnu",
    ),
    "x bool": (dict(x=jnp.ones(3, bool)), TypeError, "got dtype bool"),
    "x Python integer": (dict(x=1), TypeError, "x.astype(jnp.float32)"),
    "x integer in evaluation": (
        dict(x=jnp.arange(3), deterministic=True),
        TypeError,
        "floating-point",
    ),
    "key missing": (dict(key=None), ValueError, "Pass key=jax.random.key(seed)"),
    "key missing, fix": (dict(key=None), ValueError, "deterministic=True"),
    "key seed": (dict(key=0), TypeError, "Make one with jax.random.key(seed)"),
    "key floats": (dict(key=jnp.ones(2)), TypeError, "dtype float32"),
    "key batch": (dict(key=jax.random.split(KEY, 3)), ValueError, "keys of shape (3,)"),
    "key batch fix": (dict(key=jax.random.split(KEY, 3)), ValueError, "jax.vmap(dropout"),
    "key raw batch": (dict(key=jnp.stack([RAW, RAW])), ValueError, "array of shape (2, 2)"),
    "key raw width": (dict(key=jnp.zeros(3, jnp.uint32)), ValueError, "2 or 4 uint32 words, got 3"),
    "deterministic None": (dict(deterministic=None), TypeError, "got None"),
    "deterministic integer": (
        dict(deterministic=1),
        TypeError,
        "deterministic must be True, False",
    ),
    "deterministic float array": (dict(deterministic=jnp.float32(1)), TypeError, "boolean scalar"),
    "deterministic vector": (dict(deterministic=jnp.ones(2, bool)), ValueError, "shape (2,)"),
    "precision": (dict(precision=8), ValueError, "None, 16 or 32 (bits"),
    "precision float": (dict(precision=16.0), ValueError, "got 16.0"),
    "precision bool": (dict(precision=True), ValueError, "got True"),
    "broadcast_dims axis": (dict(broadcast_dims=(2,)), ValueError, "axis 2, but the array has 2"),
    "broadcast_dims negative": (dict(broadcast_dims=(-3,)), ValueError, "from -2 to 1"),
    "broadcast_dims integer": (dict(broadcast_dims=0), TypeError, "Write (axis,)"),
    "broadcast_dims float": (dict(broadcast_dims=(0.0,)), TypeError, "broadcast_dims"),
    "start alone": (dict(start=(0, 0)), ValueError, "start was given without global_shape"),
    "global_shape alone": (dict(global_shape=(8, 8)), ValueError, "without start"),
    "start rank": (dict(start=(0,), global_shape=(8, 8)), ValueError, "same number of axes"),
    "global_shape rank": (dict(start=(0, 0), global_shape=(8,)), ValueError, "same number of axes"),
    "block outside": (
        dict(start=(5, 0), global_shape=(8, 8)),
        ValueError,
        "outside the mask on axis 0: start 5, size 4, but global_shape has 8",
    ),
    "block before": (dict(start=(0, -1), global_shape=(8, 8)), ValueError, "start -1"),
    "block larger": (dict(start=(0, jnp.int32(0)), global_shape=(8, 4)), ValueError, "axis 1"),
    "start array before": (
        dict(start=(0, jnp.int32(-1)), global_shape=(8, 8)),
        ValueError,
        "start -1",
    ),
    "start array outside": (
        dict(start=(np.int64(5), 0), global_shape=(8, 8)),
        ValueError,
        "start 5, size 4",
    ),
    "start whole array": (
        dict(start=np.array([0, 0]), global_shape=(8, 8)),
        TypeError,
        "Write tuple(start)",
    ),
    "start float": (dict(start=(0.0, 0), global_shape=(8, 8)), TypeError, "lax.axis_index"),
    "start scalar": (dict(start=0, global_shape=(8, 8)), TypeError, "start must be a sequence"),
    "global_shape huge": (
        dict(start=(0, 0), global_shape=(2**40, 2**40)),
        ValueError,
        "more than 2**64 elements",
    ),
    "global_shape negative": (dict(start=(0, 0), global_shape=(-8, 8)), ValueError, "negative"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_dropout_names_the_argument_the_value_and_the_fix(case, wrap):
    changes, error, text = CASES[case]
    arguments = dict(key=KEY, x=X, rate=0.5) | changes
    with pytest.raises(error, match=re.escape(text)):
        wrap(lambda: jdropout.dropout(**arguments))()


SHARED = [case for case in CASES if not case.startswith(("x ", "deterministic"))]


@pytest.mark.parametrize("case", SHARED)
def test_keep_mask_raises_the_same(case):
    changes, error, text = CASES[case]
    arguments = dict(key=KEY, rate=0.5, shape=X.shape) | changes
    with pytest.raises(error, match=re.escape(text)):
        jdropout.keep_mask(**arguments)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("rate", "precision"))])
def test_effective_rate_raises_the_same(case):
    changes, error, text = CASES[case]
    arguments = dict(rate=0.5) | changes
    with pytest.raises(error, match=re.escape(text)):
        jdropout.effective_rate(**arguments)


@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        (3, TypeError, "shape must be a sequence of integers, got 3"),
        ((2, 3.0), TypeError, "Write (n,) for one axis"),
        ((2, -3), ValueError, "negative size, got (2, -3)"),
    ],
)
def test_keep_mask_names_a_bad_shape(shape, error, text):
    with pytest.raises(error, match=re.escape(text)):
        jdropout.keep_mask(KEY, 0.5, shape)


def test_a_symbolic_shape_is_named_and_evaluation_exports_with_one():
    (size,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 24), jnp.float32)
    with pytest.raises(ValueError, match="x must have a static shape"):
        export.export(jax.jit(lambda x: jdropout.dropout(KEY, x, 0.5)))(x)
    export.export(jax.jit(lambda x: jdropout.dropout(KEY, x, 0.5, deterministic=True)))(x)


def test_errors_come_before_any_computation():
    with jax.no_tracing(), pytest.raises(ValueError, match="rate must be in"):
        jdropout.dropout(KEY, X, 1.5)
