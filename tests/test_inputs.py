"""What other code passes: arrays that JAX would read wrongly, odd dtypes, odd options."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen, nnx

import jdropout
import jdropout.equinox
import jdropout.linen
import jdropout.nnx
from jdropout import by_position, schedules, testing, uncertainty

KEY = jax.random.key(0)
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
TABLE = X.reshape(6, 4)

ENTRIES = {
    "dropout": lambda x: jdropout.dropout(KEY, x, 0.5),
    "spatial_dropout": lambda x: jdropout.spatial_dropout(KEY, x, 0.5),
    "drop_path": lambda x: jdropout.drop_path(KEY, x, 0.5),
    "drop_connect": lambda x: jdropout.drop_connect(KEY, x, 0.5),
    "drop_connect_tree": lambda x: jdropout.drop_connect_tree(
        KEY, {"kernel": x}, 0.5, select=["kernel"]
    )["kernel"],
    "targeted_dropout": lambda x: jdropout.targeted_dropout(KEY, x, 0.5, target_fraction=0.5),
    "alpha_dropout": lambda x: jdropout.alpha_dropout(KEY, x, 0.5),
    "gaussian_noise": lambda x: jdropout.gaussian_noise(KEY, x, 0.5),
    "standout": lambda x: jdropout.standout(KEY, x, x),
    "zoneout": lambda x: jdropout.zoneout(KEY, x, x, 0.5),
    "patch_dropout": lambda x: jdropout.patch_dropout(KEY, x, 0.5)[0],
    "drop_block": lambda x: jdropout.drop_block(KEY, x, 0.5, block_size=2, spatial_axes=(1,)),
    "bias_dropout_add": lambda x: jdropout.bias_dropout_add(KEY, x, None, x, 0.5),
    "layer_drop": lambda x: jdropout.layer_drop(KEY, lambda x: x, x, 0.5),
    "entropy": uncertainty.entropy,
    "attention": lambda x: jdropout.dot_product_attention(
        x, x, x, dropout_key=KEY, dropout_rate=0.5
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_arrays_that_jax_reads_wrongly_are_converted_or_refused(name):
    call = ENTRIES[name]
    expected = call(X)  # first: JAX's fast path then takes any array of this shape
    np.testing.assert_array_equal(call(X.astype(">f4")), expected)
    np.testing.assert_array_equal(call(nnx.Param(jnp.asarray(X))), expected)
    with pytest.raises(TypeError, match=r"must be a plain array.*filled"):
        call(np.ma.masked_array(X, X > 0))
    for dtype in (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn):
        with pytest.raises(TypeError, match=r"float6_.* Convert it with \w+"):
            call(np.zeros(X.shape, dtype))
    for dtype in (object, np.longdouble, "U1", "datetime64[D]"):
        with pytest.raises(TypeError, match="must have a dtype that JAX has, got"):
            call(np.zeros(X.shape, dtype))


ML_DTYPES = sorted(name for name in ml_dtypes.__all__ if name[0] in "bfcui" and name[-1].isalnum())


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if hasattr(ml_dtypes, name)])
def test_every_dtype_of_ml_dtypes_works_or_is_refused(name):
    dtype = getattr(ml_dtypes, name)
    if not (isinstance(dtype, type) and issubclass(dtype, np.generic)):
        return
    x = np.ones((1, 8), dtype)
    if name.startswith(("float6", "float8_e8m0", "int", "uint", "complex", "bcomplex")):
        with pytest.raises(TypeError, match=r"x must .*onvert.* with x\.astype"):
            jdropout.dropout(KEY, x, 0.5)
    else:
        y = jdropout.dropout(KEY, x, 0.5)
        assert y.dtype == dtype
        assert set(np.asarray(y, np.float32).flat) == {0, 2}


def test_integers_that_jax_would_narrow_are_refused():
    logits = jnp.zeros((3, 2, 4))
    query = jnp.zeros((2, 3, 1, 4))
    for name, call in {
        "labels": lambda x: uncertainty.predictive_log_likelihood(logits, x),
        "tokens": lambda x: jdropout.word_dropout(KEY, x, 0.5, replacement=1),
        "key_value_seq_lengths": lambda x: jdropout.dot_product_attention(
            query, query, query, dropout_key=None, dropout_rate=0.0, key_value_seq_lengths=x
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must fit int32.*jax_enable_x64.*2147483648"):
            call(np.array([2**31, 1]))


QUERY = X[:, :, None]
SWITCHES = {
    "is_causal": lambda flag: jdropout.dot_product_attention(
        QUERY, QUERY, QUERY, dropout_key=KEY, dropout_rate=0.5, is_causal=flag
    ),
    "consistent": lambda flag: jdropout.mc_predict(
        ENTRIES["dropout"], KEY, X, num_samples=2, consistent=flag
    ),
    "return_samples": lambda flag: jdropout.mc_predict(
        ENTRIES["dropout"], KEY, X, num_samples=2, return_samples=flag
    ),
    "shared_channels": lambda flag: jdropout.drop_block(
        KEY, X, 0.5, block_size=2, spatial_axes=(1,), shared_channels=flag
    ),
    "ordered": lambda flag: jdropout.patch_dropout(KEY, X, 0.5, ordered=flag),
    "unbiased": lambda flag: jdropout.layer_drop(KEY, lambda x: x, X, 0.5, unbiased=flag),
    "scale_by_keep": lambda flag: jdropout.drop_path(KEY, X, 0.5, scale_by_keep=flag),
    "scaled": lambda flag: jdropout.drop_connect_tree(
        KEY, {"kernel": X}, 0.5, select=["kernel"], scaled=flag
    ),
}


@pytest.mark.parametrize(
    ("name", "flag"), list(itertools.product(SWITCHES, ["no", jnp.array(True), 1]))
)
def test_static_switches_are_true_or_false(name, flag):
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got .*Python bool"):
        SWITCHES[name](flag)


def variational(**options):
    return jdropout.linen.VariationalDense(3, **options)


LONG = jax.ShapeDtypeStruct((2**31,), jnp.int32)  # iterating over it would take hours
BAD = {
    "epsilon must be a finite number": lambda: jdropout.dropout_add_norm(
        KEY, X, X, 0.5, epsilon=-1
    ),
    "epsilon must be a number": lambda: jdropout.dropout_add_norm(KEY, X, X, 0.5, epsilon=None),
    "mode must be 'row' or 'batch'": lambda: jdropout.drop_path(KEY, X, 0.5, mode=np.array("row")),
    "rate must be a number": lambda: jdropout.zoneout(KEY, X, X, None),
    "temperature must be a number": lambda: jdropout.concrete_dropout(
        KEY, X, jnp.float32(0), temperature="1"
    ),
    "stddev must be a number that a float can hold": lambda: jdropout.gaussian_noise(
        KEY, X, 10**400
    ),
    "give a precision of inf": lambda: uncertainty.model_precision(
        0.1, length_scale=1e200, weight_decay=1.0, num_examples=3
    ),
    "map_shape must be at least 1": lambda: jdropout.drop_block_gamma(0.1, (0, 5), 2),
    "rates must be a sequence": lambda: schedules.piecewise(None, [1]),
    "schedules must be a sequence": lambda: schedules.join(schedules.constant(0.1), []),
    "schedules must not be empty": lambda: schedules.join([], []),
    "step must be a number": lambda: schedules.late(0.1, 5)(jnp.float32(jnp.nan)),
    "The order is key, input, rate": lambda: jdropout.dropout(KEY, jnp.float32(0.5), X),
    "the order is key, input, rate": lambda: jdropout.dropout(KEY, 0.5, jnp.float32(0.1)),
    "rate must be a number in .*timedelta64": lambda: jdropout.dropout(KEY, X, np.timedelta64(0)),
    "deterministic must be True, False": lambda: jdropout.dropout(
        KEY, X, 0.5, deterministic=np.ma.masked
    ),
    "broadcast_dims must be a sequence of axes": lambda: jdropout.dropout(
        KEY, X, 0.5, broadcast_dims=[True]
    ),
    "dropout_broadcast_dims must be a sequence": lambda: jdropout.dot_product_attention(
        QUERY, QUERY, QUERY, dropout_key=KEY, dropout_rate=0.5, dropout_broadcast_dims=0
    ),
    "precision must be one of JAX's": lambda: jdropout.dot_product_attention(
        QUERY, QUERY, QUERY, dropout_key=KEY, dropout_rate=0.5, precision=[]
    ),
    "batch_axis must be an integer": lambda: jdropout.unit_subset(
        KEY, lambda w, v, x: x, TABLE, TABLE.T, X, 0.5, batch_axis="0"
    ),
    "mean must fit int32": lambda: uncertainty.gaussian_nll(2**64, X, X),
    "batches must fit int32": lambda: testing.record_training(
        lambda w, x: w, np.float32(1), [2**63]
    ),
    "cell must return a pair": lambda: jdropout.nnx.Zoneout(lambda *_: X, 0.5)(
        X, X, deterministic=True
    ),
    "batches must be iterable, got 'w'": lambda: testing.record_training(len, X, "w"),
    "num_bins must be below": lambda: uncertainty.expected_calibration_error(
        TABLE, np.zeros(6, np.int32), num_bins=10**400
    ),
    "w must have fewer than": lambda: jax.eval_shape(
        lambda w: jdropout.targeted_dropout(KEY, w, 0.5, target_fraction=0.5),
        jax.ShapeDtypeStruct((2**20, 2**20, 2), np.float32),
    ),
    "mean must fit float32": lambda: uncertainty.gaussian_nll(1e300, X, X),
    "select must return True or False": lambda: jdropout.drop_connect_tree(
        KEY, {"kernel": X}, 0.5, select=lambda path: np.ones(3)
    ),
    "logits must have an axis of classes": lambda: uncertainty.entropy(jnp.float32(1)),
    "block_size must leave at most": lambda: jdropout.drop_block_gamma(0.1, (2**40,), 2**30),
    "output_axis must be an integer": lambda: jdropout.targeted_dropout(
        KEY, X, 0.5, target_fraction=0.5, unit_axis=0, output_axis=1.0
    ),
    "groups must be an integer": lambda: jdropout.layer_subset(
        KEY, lambda w, x: x, jnp.ones(3), X, 0.5, groups="1", deterministic=True
    ),
    "layer must return .* got str": lambda: jdropout.layer_drop(KEY, lambda x: "text", X, 0.0),
    "depth must be below": lambda: jdropout.drop_path_rates(0.5, 2**40),
    "num_heads must be below": lambda: by_position.alibi_slopes(2**30),
    "shape must have fewer than": lambda: jdropout.keep_mask(KEY, 0.5, (2**40, 2**40)),
    "batch_size must be at most": lambda: jdropout.mc_predict(
        len, KEY, X, num_samples=2, batch_size=2**64
    ),
    "threshold must be a number that a float": lambda: jdropout.variational_dropout(
        KEY, X, jnp.float32(0), threshold=10**400
    ),
    "rate must be one rate, or a tree": lambda: jdropout.zoneout(KEY, X, X, ()),
    "stacked_params must have fewer than": lambda: jax.eval_shape(
        lambda w: jdropout.layer_subset(KEY, lambda w, x: x, w, X, 0.5), LONG
    ),
    "rate must be a Python number": lambda: jax.eval_shape(
        lambda rate: jdropout.drop_path_rates(rate, 3), 0.5
    ),
    "step must be a number here": lambda: jax.eval_shape(
        lambda: schedules.buckets(schedules.late(0.1, 5), [0.1])(3)
    ),
    "boundaries must be a sequence of steps": lambda: jax.eval_shape(
        lambda x: schedules.piecewise([0.1, 0.2], x), LONG
    ),
    "shape must be a sequence of integers": lambda: jax.eval_shape(
        lambda x: jdropout.keep_mask(KEY, 0.5, x), LONG
    ),
    "key_range must be a function": lambda: by_position.PositionFunction(len, key_range=3),
    "inference must be True, False": lambda: jdropout.equinox.Dropout(0.5, inference="no"),
    "train must be a function": lambda: testing.assert_reproducible(3),
    "clear_caches must be True or False": lambda: testing.assert_reproducible(
        lambda: X, clear_caches=1
    ),
    "forward_mode must be True or False": lambda: testing.assert_backward_uses_forward_mask(
        lambda x: x, X, forward_mode=1
    ),
    "devices must be a sequence of JAX devices": lambda: testing.assert_sharding_invariant(
        len, X, devices=[1, 2]
    ),
    "batches must be iterable": lambda: testing.record_training(len, X, 3),
    "path must be a string or a path": lambda: testing.Recording.load(-1),
    "allow must hold strings": lambda: jdropout.audit(jnp.sin, X).assert_clean(allow=3),
    "use_bias must be True or False": lambda: variational(use_bias=1),
    "kernel_init must be a function": lambda: variational(kernel_init=1),
    "param_dtype must be a floating-point dtype": lambda: variational(param_dtype=jnp.complex64),
    "features must be below 2": lambda: jdropout.linen.VariationalDense(2**31),
    "inputs must have an axis of features": lambda: variational().init({}, 1.0, True),
    "batch_axes must be a sequence": lambda: jdropout.nnx.SpatialDropout(0.5, batch_axes=0),
    "spatial_axes must be a sequence": lambda: jdropout.nnx.DropBlock(
        0.5, block_size=2, spatial_axes=1
    ),
    "temperature must be a number, got '1'": lambda: jdropout.nnx.ConcreteDropout(temperature="1"),
    "return_indices must be True or False": lambda: jdropout.nnx.PatchDropout(
        0.5, return_indices=1
    ),
    "layer must be a linen module": lambda: jdropout.linen.LayerSubset(len, rate=0.5, num_layers=3),
    "num_layers must be at least 1": lambda: jdropout.linen.LayerSubset(
        linen.Dense(3), rate=0.5, num_layers=0
    ),
    "module must be a linen module": lambda: jdropout.linen.DropConnect(len, 0.5),
    "select must hold names": lambda: jdropout.linen.DropConnect(linen.Dense(3), 0.5, select=[0]),
    "cell must be a function": lambda: jdropout.nnx.Zoneout(3, 0.5),
    "incoming must be a sequence of paths": lambda: jdropout.linen.UnitSubset(
        linen.Dense(3), rate=0.5, incoming=3, outgoing=("a",)
    ),
    "positions_argument must be a string": lambda: jdropout.nnx.RouteTokens(
        len, 0.5, positions_argument=3
    )(X, deterministic=True),
    "broadcast_dropout must be True or False": lambda: jdropout.nnx.dot_product_attention(
        QUERY, QUERY, QUERY, broadcast_dropout=1
    ),
    "query must have a dtype that JAX has": lambda: jdropout.linen.dot_product_attention(
        QUERY.astype("timedelta64[D]"), QUERY, QUERY
    ),
    "batch_axis must be an integer of at least 0": lambda: jdropout.linen.with_site_keys(
        linen.Dense(3).apply, KEY, step=0, batch_axis="0"
    ),
    "only must be a filter": lambda: jdropout.nnx.mc_predict(
        jdropout.nnx.Dropout(0.5), X, KEY, num_samples=2, only=3
    ),
    "variables must be a mapping": lambda: jdropout.linen.mc_predict(
        jdropout.linen.Dropout(0.5), None, X, KEY, num_samples=2
    ),
    "model must be a nnx module": lambda: jdropout.nnx.replace_dropout(3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


OF_LAYERS = {
    "rng_collection must be a string": dict(rng_collection=3),
    "deterministic must be True, False": dict(deterministic="no"),
}


@pytest.mark.parametrize("message", OF_LAYERS)
def test_what_every_layer_takes_is_checked_when_it_is_made(message):
    for layer in (jdropout.nnx.Dropout, jdropout.nnx.ConcreteDropout, jdropout.linen.Dropout):
        with pytest.raises(TypeError, match=message):
            layer(0.5, **OF_LAYERS[message])


def test_integers_of_numpy_are_integers():
    assert jdropout.effective_rate(0.1, precision=np.int64(32)) == jdropout.effective_rate(
        0.1, precision=32
    )


def test_gamma_takes_no_longer_for_a_longer_axis():
    lengths = (10**3, 10**30)
    gammas = [jdropout.drop_block_gamma(0.1, (length,), 7) for length in lengths]
    np.testing.assert_allclose(gammas[1], -np.expm1(np.log(0.9) / 7), rtol=1e-12)
    np.testing.assert_allclose(gammas[0], gammas[1], rtol=1e-2)
    for length, block in itertools.product((1, 2, 5, 6), (1, 2, 3, 6)):
        gamma = jdropout.drop_block_gamma(0.1, (length,), block)
        size = min(block, length)
        starts = np.arange(length - size + 1)
        covered = [((starts <= i) & (i < starts + size)).sum() for i in range(length)]
        np.testing.assert_allclose(1 - np.mean((1 - gamma) ** np.array(covered)), 0.1, rtol=1e-12)


def test_nan_is_not_hidden():
    logits = jnp.array([[[jnp.nan, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(uncertainty.variation_ratio(logits), [jnp.nan, 0])
    for schedule in (schedules.late(0.1, 5), schedules.early(0.1, 5, decay="constant")):
        assert np.isnan(jax.jit(schedule)(jnp.nan))


def test_arguments_of_mc_predict_may_hold_functions():
    def fn(key, modules, x):
        activation, scale = modules
        return jdropout.dropout(key, activation(x) * scale, 0.5)

    prediction = jdropout.mc_predict(fn, KEY, (jnp.tanh, 2.0), X, num_samples=500)
    np.testing.assert_allclose(prediction.mean, 2 * np.tanh(X), atol=0.5)
