"""Zoneout and LayerDrop: the papers' formulas, their limits, and the work that is not done."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from scipy import stats

import jdropout
from jdropout._layers import layer_drop, zoneout
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""


def words(key):
    return np.asarray(jax.random.key_data(key))


def z_scores(samples, mean, variance):
    """Of sample means along the first axis, in float64."""
    samples = np.asarray(samples, np.float64)
    return (samples.mean(0) - mean) / np.sqrt(variance / len(samples))


def bound(count):
    """What the largest of so many z-scores exceeds with probability FALSE_ALARM at most."""
    return stats.norm.isf(FALSE_ALARM / (2 * count))


@pytest.fixture
def states():
    old, new = jax.random.normal(jax.random.key(1), (2, 37, 10))
    return old, new


# --- zoneout ------------------------------------------------------------------------------


def test_dropped_units_keep_their_old_value_by_the_twins_mask(states, key):
    mask = law_twin.keep_mask(words(key), 0.4, (37, 10))
    old, new = states
    np.testing.assert_array_equal(zoneout(key, old, new, 0.4), np.where(mask, new, old))
    fine = law_twin.keep_mask(words(key), 0.4, (37, 10), precision=32)
    np.testing.assert_array_equal(
        zoneout(key, old, new, 0.4, precision=32), np.where(fine, new, old)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e5m2, jnp.float32, jnp.complex64])
def test_evaluation_is_the_expectation_with_the_effective_rate_rounded_once(dtype, states):
    old, new = (x.astype(dtype) for x in states)
    y = zoneout(None, old, new, 0.1, deterministic=True)
    assert y.dtype == dtype
    rate = jdropout.effective_rate(0.1)
    wide = np.complex128 if dtype == jnp.complex64 else np.float64
    a, b = np.asarray(old).astype(wide), np.asarray(new).astype(wide)
    expected = (rate * a + (1 - rate) * b).astype(dtype).astype(wide)
    tolerance = 1e-6 if jnp.finfo(dtype).bits == 32 else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y).astype(wide), expected, rtol=tolerance, atol=1e-6)


def test_both_ends_are_one_of_the_states_itself_without_a_key():
    old, new = jnp.full((2, 3), jnp.nan), jnp.full((2, 3), jnp.inf)
    for deterministic in (False, True):
        assert zoneout(None, old, new, 0.0, deterministic=deterministic) is new
        assert zoneout(None, old, new, 1, deterministic=deterministic) is old
        assert zoneout(None, old, new, 1e-12, deterministic=deterministic) is new


@pytest.mark.parametrize("deterministic", [False, True])
def test_traced_rates_are_exact_at_both_ends_and_equal_static_ones_between(
    deterministic, states, key
):
    old, new = states
    new = new.at[0, 0].set(jnp.inf)

    @jax.jit
    def f(rate, old, new):
        return zoneout(key, old, new, rate, deterministic=deterministic)

    np.testing.assert_array_equal(f(0.0, old.at[1, 1].set(jnp.nan), new), new)
    np.testing.assert_array_equal(f(1.0, old, new.at[1, 1].set(jnp.nan)), old)
    static = zoneout(key, old, new, 0.25, deterministic=deterministic)
    np.testing.assert_allclose(f(0.25, old, new), static, rtol=1e-6)
    assert jnp.isnan(f(1.5, old, new)).all()
    assert jnp.isnan(f(jnp.nan, old, new)).all()
    assert f._cache_size() == 1
    with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
        checkify.checkify(f, errors=checkify.user_checks)(-0.5, old, new)[0].throw()
    assert jax.grad(lambda rate: f(rate, old, states[1]).sum())(0.25) == 0


def test_a_traced_flag_takes_the_expectation_or_the_sample(states, key):
    for rate in (0.25, jnp.float32(0.25), 1.0):
        f = jax.jit(lambda flag, rate=rate: zoneout(key, *states, rate, deterministic=flag))
        np.testing.assert_array_equal(f(False), zoneout(key, *states, rate))
        evaluation = zoneout(None, *states, rate, deterministic=True)
        np.testing.assert_allclose(f(True), evaluation, rtol=1e-5, atol=1e-6)


def test_gradients_go_to_the_state_that_a_unit_has(states, key):
    mask = np.asarray(jdropout.keep_mask(key, 0.4, (37, 10)))
    cotangent = jnp.ones((37, 10))
    for wrap in (jax.jit, jax.checkpoint):
        f = wrap(lambda old, new: zoneout(key, old, new, 0.4))
        to_old, to_new = jax.vjp(f, *states)[1](cotangent)
        np.testing.assert_array_equal(to_new, mask)
        np.testing.assert_array_equal(to_old, ~mask)
        np.testing.assert_array_equal(jax.jvp(f, states, states)[1], f(*states))
    rate = np.float32(jdropout.effective_rate(0.4))
    evaluated = jax.vjp(lambda a, b: zoneout(None, a, b, 0.4, deterministic=True), *states)[1]
    np.testing.assert_allclose(evaluated(cotangent)[0], jnp.full((37, 10), rate), rtol=1e-6)
    np.testing.assert_allclose(evaluated(cotangent)[1], jnp.full((37, 10), 1 - rate), rtol=1e-6)


def test_the_only_residual_is_the_key(states, key):
    for wrap in (lambda f: f, jax.jit):
        pullback = jax.vjp(wrap(lambda a, b: zoneout(key, a, b, 0.4)), *states)[1]
        (leaf,) = jax.tree.leaves(pullback)
        np.testing.assert_array_equal(leaf, words(key))


def test_trees_have_a_key_and_may_have_a_rate_for_each_array(states, key):
    carry, update = (states[0], states[0] * 2), (states[1], states[1] * 2)  # an LSTM's (c, h)
    for rate, rates in ((0.5, (0.5, 0.5)), ((0.5, 0.05), (0.5, 0.05))):
        y = zoneout(key, carry, update, rate)
        assert isinstance(y, tuple)
        for i in range(2):
            own = at_site(key, i)
            np.testing.assert_array_equal(y[i], zoneout(own, carry[i], update[i], rates[i]))
            mask = law_twin.keep_mask(words(own), rates[i], (37, 10))
            np.testing.assert_array_equal(y[i], np.where(mask, update[i], carry[i]))
    named = zoneout(key, {"c": carry[0]}, {"c": update[0]}, 0.5)
    np.testing.assert_array_equal(named["c"], zoneout(at_site(key, "c"), carry[0], update[0], 0.5))
    mixed = zoneout(key, carry, update, (0.0, 1.0))
    assert mixed[0] is update[0]
    assert mixed[1] is carry[1]


def test_a_scan_over_time_and_vmap_equal_their_loops(states, key):
    def step(state, t):
        new = jnp.tanh(state + 1)
        return zoneout(at_site(key, t), state, new, 0.5), None

    scanned, _ = lax.scan(step, states[0], jnp.arange(4))
    looped = states[0]
    for t in range(4):
        looped, _ = step(looped, t)
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)
    keys = jax.random.split(key, 3)
    f = functools.partial(zoneout, old=states[0], new=states[1], rate=0.5)
    np.testing.assert_array_equal(jax.vmap(f)(keys), jnp.stack([f(k) for k in keys]))


def test_the_mean_over_masks_is_the_evaluation():
    """n = 2^13 masks of 64 units, each mean a z-score; false alarm 1e-8."""
    old, new = jnp.linspace(-1, 1, 64), jnp.linspace(3, 2, 64)
    keys = jax.random.split(jax.random.key(5), 1 << 13)
    samples = jax.vmap(lambda k: zoneout(k, old, new, 0.3))(keys)
    rate = jdropout.effective_rate(0.3)
    gap = np.asarray(new - old, np.float64)
    variance = rate * (1 - rate) * gap**2
    evaluation = zoneout(None, old, new, 0.3, deterministic=True)
    assert np.abs(z_scores(samples, evaluation, variance)).max() < bound(64)
    swapped = zoneout(None, new, old, 0.3, deterministic=True)  # the control
    assert np.abs(z_scores(samples, swapped, variance)).max() > bound(64)


X = jnp.ones((3, 4))
ZONEOUT_ERRORS = {
    "structure": (dict(old=(X,)), ValueError, "old and new must have the same structure"),
    "shape": (dict(old=X[:2]), ValueError, "got float32[2, 4] and float32[3, 4]"),
    "dtype": (dict(old=X.astype(jnp.bfloat16)), ValueError, "got bfloat16[3, 4] and float32"),
    "integers": (
        dict(old=X.astype(int), new=X.astype(int)),
        TypeError,
        "old must be a floating-point or complex array",
    ),
    "key": (dict(key=None), ValueError, "key is None"),
    "key of a tree": (dict(key=None, old=(X,), new=(X,)), ValueError, "key is None"),
    "rate": (dict(rate=2.0), ValueError, "rate must be in [0, 1], got 2.0"),
    "rate in evaluation": (dict(rate=-1, deterministic=True), ValueError, "got -1"),
    "rates": (dict(rate=(0.5, 0.5)), ValueError, "rate must be one rate, or a tree of them"),
    "precision": (dict(precision=8), ValueError, "precision must be None, 16 or 32"),
    "flag": (dict(deterministic=None), TypeError, "deterministic must be"),
}


@pytest.mark.parametrize("case", ZONEOUT_ERRORS)
def test_errors_of_zoneout_name_the_argument_and_the_fix(case, key):
    changes, error, text = ZONEOUT_ERRORS[case]
    with pytest.raises(error, match=re.escape(text)):
        zoneout(**(dict(key=key, old=X, new=X, rate=0.5) | changes))


# --- layer_drop ---------------------------------------------------------------------------


def layer(x):
    return x + jnp.sin(x)


def keys_by_fate(rate=0.5, count=16):
    """Keys whose layer the twin keeps, and keys whose layer it drops."""
    keys = jax.random.split(jax.random.key(7), count)
    kept = [bool(law_twin.keep_mask(words(key), rate, ())) for key in keys]
    return [k for k, m in zip(keys, kept, strict=True) if m], [
        k for k, m in zip(keys, kept, strict=True) if not m
    ]


def test_a_layer_is_run_or_skipped_as_the_twins_mask_says():
    x = jnp.linspace(-1, 1, 6)
    f = jax.jit(lambda key: layer_drop(key, layer, x, 0.5))
    kept, dropped = keys_by_fate()
    assert kept
    assert dropped
    for key in kept:
        np.testing.assert_allclose(f(key), layer(x), rtol=1e-6)
    for key in dropped:
        np.testing.assert_array_equal(f(key), x)


def test_unbiased_scales_what_a_kept_layer_adds():
    x = jnp.linspace(-1, 1, 6)
    kept, dropped = keys_by_fate()
    scaled = layer_drop(kept[0], layer, x, 0.5, unbiased=True)
    np.testing.assert_allclose(scaled, x + 2 * jnp.sin(x), rtol=1e-6)
    np.testing.assert_array_equal(layer_drop(dropped[0], layer, x, 0.5, unbiased=True), x)
    half = layer_drop(kept[0], layer, x.astype(jnp.bfloat16), 0.5, unbiased=True)
    assert half.dtype == jnp.bfloat16


def test_static_ends_and_evaluation_need_no_key_and_make_no_choice():
    x = jnp.full(3, jnp.inf)
    never = functools.partial(pytest.fail, "the layer was called")
    result = layer(x)
    for unbiased in (False, True):
        assert layer_drop(None, never, x, 1.0, unbiased=unbiased) is x
        for options in (dict(rate=0.0), dict(rate=0.5, deterministic=True)):
            assert layer_drop(None, lambda x: result, x, unbiased=unbiased, **options) is result


@pytest.mark.parametrize("unbiased", [False, True])
def test_traced_rates_and_flags(unbiased):
    x = jnp.linspace(-1, 1, 6)
    traces = 0

    @jax.jit
    def f(key, rate, flag):
        def counted(x):
            nonlocal traces
            traces += 1
            return layer(x)

        return layer_drop(key, counted, x, rate, deterministic=flag, unbiased=unbiased)

    kept, dropped = keys_by_fate()
    for key in (kept[0], dropped[0]):
        np.testing.assert_allclose(f(key, 0.0, False), layer(x), rtol=1e-6)
        np.testing.assert_allclose(f(key, 0.5, True), layer(x), rtol=1e-6)
        np.testing.assert_array_equal(f(key, 1.0, False), x)
        np.testing.assert_allclose(
            f(key, 0.5, False), layer_drop(key, layer, x, 0.5, unbiased=unbiased), rtol=1e-6
        )
        assert jnp.isnan(f(key, 1.5, False)).all()
        assert jax.grad(lambda rate, key=key: f(key, rate, False).sum())(0.5) == 0
    before = traces
    f(kept[1], 0.7, False)
    assert traces == before
    with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
        checkify.checkify(f, errors=checkify.user_checks)(kept[0], -0.5, False)[0].throw()


def test_a_layer_is_traced_once(key):
    calls = []

    def counted(x):
        calls.append(x)
        return layer(x)

    jax.jit(lambda key, x: layer_drop(key, counted, x, 0.5))(key, jnp.ones(3))
    assert len(calls) == 1


def counting(runs):
    """A layer that counts how often it is really run."""

    def run(x):
        jax.debug.callback(lambda: runs.append(1))
        return layer(x)

    return run


def test_a_skipped_layer_is_not_run():
    kept, dropped = keys_by_fate()
    runs = []
    f = jax.jit(lambda key, x: layer_drop(key, counting(runs), x, 0.5))
    for key in dropped:
        f(key, jnp.ones(3)).block_until_ready()
    jax.effects_barrier()
    assert not runs
    for key in kept:
        f(key, jnp.ones(3)).block_until_ready()
    jax.effects_barrier()
    assert len(runs) == len(kept)


DEPTH = 6


def stack(key, x, weights, rates, runs=None):
    def body(x, inputs):
        i, w, rate = inputs

        def run(x):
            if runs is not None:
                jax.debug.callback(lambda: runs.append(1))
            return x + jnp.tanh(x @ w)

        return layer_drop(at_site(key, i), run, x, rate), None

    return lax.scan(body, x, (jnp.arange(DEPTH), weights, rates))[0]


def stack_inputs():
    weights = jax.random.normal(jax.random.key(2), (DEPTH, 8, 8)) / 8
    return jnp.ones((4, 8)), weights, jnp.linspace(0.0, 0.9, DEPTH)


def test_a_scan_over_layers_runs_those_that_are_kept_at_their_own_rates(key):
    x, weights, rates = stack_inputs()
    kept = [
        bool(law_twin.keep_mask(words(at_site(key, i)), float(rates[i]), (), precision=16))
        for i in range(DEPTH)
    ]
    assert 1 < sum(kept) < DEPTH
    runs = []
    y = jax.jit(functools.partial(stack, runs=runs))(key, x, weights, rates)
    y.block_until_ready()
    jax.effects_barrier()
    assert len(runs) == sum(kept)
    expected = x
    for w, m in zip(weights, kept, strict=True):
        expected = expected + jnp.tanh(expected @ w) if m else expected
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_gradients_through_a_scan_are_those_of_the_layers_that_were_kept(key):
    x, weights, rates = stack_inputs()
    gradient = jax.jit(jax.grad(lambda w: stack(key, x, w, rates).sum()))(weights)
    kept = [bool(jdropout.keep_mask(at_site(key, i), rates[i], ())) for i in range(DEPTH)]

    def chosen(weights):
        y = x
        for w, m in zip(weights, kept, strict=True):
            y = y + jnp.tanh(y @ w) if m else y
        return y.sum()

    np.testing.assert_allclose(gradient, jax.grad(chosen)(weights), rtol=1e-4, atol=1e-5)
    assert [bool(g.any()) for g in gradient] == kept


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_the_layers_product_is_inside_a_conditional_of_the_compiled_program(differentiate, key):
    w = jnp.ones((64, 64))

    def f(x):
        return layer_drop(key, lambda x: x + jnp.tanh(x @ w), x, 0.5).sum()

    def entry(function):
        text = jax.jit(function).lower(jnp.ones((64, 64))).compile().as_text()
        assert " dot(" in text or "matmul" in text or "dot" in text
        start = text.index("\nENTRY ")
        return text[start:]

    program = entry(jax.grad(f) if differentiate else f)
    assert "conditional(" in program
    assert " dot(" not in program

    def selected(x):  # the control: a product that is always taken
        y = x + jnp.tanh(x @ w)
        return jnp.where(jdropout.keep_mask(key, 0.5, ()), y, x).sum()

    control = entry(jax.grad(selected) if differentiate else selected)
    assert "conditional(" not in control


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients_of_a_kept_and_of_a_dropped_layer(unbiased):
    x = jnp.linspace(-1, 1, 6)
    kept, dropped = keys_by_fate()

    @jax.jit
    def derivatives(key, x):
        def f(x):
            return layer_drop(key, layer, x, 0.5, unbiased=unbiased)

        tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
        gradients = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (f, jax.checkpoint(f))]
        return jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(x), tangent, *gradients

    factor = 2 if unbiased else 1
    second, *firsts = derivatives(kept[0], x)
    for first in firsts:
        np.testing.assert_allclose(first, 1 + factor * jnp.cos(x), rtol=1e-5)
    np.testing.assert_allclose(second, -factor * jnp.sin(x), rtol=1e-5, atol=1e-6)
    second, *firsts = derivatives(dropped[0], x)
    for first in firsts:
        np.testing.assert_array_equal(first, jnp.ones(6))
    np.testing.assert_array_equal(second, jnp.zeros(6))


def test_besides_what_the_layer_needs_only_the_decision_is_stored(key):
    x = jnp.ones((32, 8))
    pullback = jax.vjp(jax.jit(lambda x: layer_drop(key, layer, x, 0.5)), x)[1]
    leaves = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype")]
    assert sum(leaf.size for leaf in leaves) <= x.size + 2  # the cosine of the layer


def test_trees_with_integers_pass_through_a_layer_together():
    kept, dropped = keys_by_fate()
    x = {"h": jnp.ones(3), "count": jnp.int32(4)}

    def counted(x):
        return {"h": x["h"] + 1, "count": x["count"] + 1}

    for unbiased in (False, True):
        y = layer_drop(kept[0], counted, x, 0.5, unbiased=unbiased)
        np.testing.assert_array_equal(y["h"], jnp.full(3, 3.0 if unbiased else 2.0))
        assert y["count"] == 5
        y = layer_drop(dropped[0], counted, x, 0.5, unbiased=unbiased)
        np.testing.assert_array_equal(y["h"], x["h"])
        assert y["count"] == 4


def test_under_vmap_over_keys_both_sides_are_computed_and_each_example_has_its_own():
    kept, dropped = keys_by_fate()
    keys, x = jnp.stack([kept[0], dropped[0]]), jnp.ones((2, 3))
    y = jax.vmap(lambda k, x: layer_drop(k, layer, x, 0.5))(keys, x)
    np.testing.assert_allclose(y, jnp.stack([layer(x[0]), x[1]]), rtol=1e-6)

    def program(in_axes, key):
        f = jax.vmap(lambda k, x: layer_drop(k, layer, x, 0.5), in_axes=in_axes)
        return str(jax.make_jaxpr(f)(key, x))

    assert " cond[" not in program((0, 0), keys)
    assert " cond[" in program((None, 0), keys[0])


def test_layers_of_a_shard_map_agree_on_what_is_skipped():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = jax.random.normal(jax.random.key(1), (16, 4)), jnp.ones((4, 4))

    def f(key, x):
        return layer_drop(key, lambda x: x + jnp.tanh(x @ w), x, 0.5, unbiased=True)

    specs = dict(in_specs=(jax.P(), jax.P("a")), out_specs=jax.P("a"))
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, **specs))
    for key in (keys[0] for keys in keys_by_fate()):
        np.testing.assert_allclose(sharded(key, x), f(key, x), rtol=1e-5)


def test_the_mean_over_masks_is_that_of_the_formula():
    """n = 2^12 decisions, one z-score each; false alarm 1e-8."""
    keys, rate = jax.random.split(jax.random.key(9), 1 << 12), jdropout.effective_rate(0.3)
    x = jnp.full(1, 2.0)
    update = float(jnp.sin(2.0))

    def score(mean, **options):
        y = jax.vmap(lambda k: layer_drop(k, layer, x, 0.3, **options))(keys)
        factor = 1 / (1 - rate) if options else 1
        return abs(z_scores(y, mean, rate * (1 - rate) * (factor * update) ** 2).item())

    evaluation = float(layer(x)[0])
    assert score(2.0 + (1 - rate) * update) < bound(1)
    assert score(evaluation) > bound(1)  # the control: LayerDrop's mean is not its evaluation
    assert score(evaluation, unbiased=True) < bound(1)


LAYER_ERRORS = {
    "layer": (dict(layer=3), TypeError, "layer must be a function, got int"),
    "shape": (dict(layer=lambda x: x[:2]), ValueError, "float32[3, 4], got float32[2, 4]"),
    "dtype": (dict(layer=lambda x: x.astype(jnp.bfloat16)), ValueError, "got bfloat16[3, 4]"),
    "structure": (dict(layer=lambda x: (x, x)), ValueError, "structure of its input"),
    "key": (dict(key=None), ValueError, "key is None"),
    "rate": (dict(rate=2.0), ValueError, "rate must be in [0, 1], got 2.0"),
    "flag": (dict(deterministic=1), TypeError, "deterministic must be"),
    "x": (dict(x="text"), TypeError, "x must be an array, got str"),
    "shape in evaluation": (
        dict(layer=lambda x: x[:2], deterministic=True),
        ValueError,
        "include the residual connection",
    ),
}


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_errors_of_layer_drop_name_the_argument_and_the_fix(case, key):
    changes, error, text = LAYER_ERRORS[case]
    with pytest.raises(error, match=re.escape(text)):
        layer_drop(**(dict(key=key, layer=layer, x=X, rate=0.5) | changes))


# --- audit --------------------------------------------------------------------------------


def test_an_audit_sees_states_and_layers_and_dropout_inside_of_them(key):
    def step(key, x, step):
        key = jax.random.fold_in(key, step)

        def body(x, i):
            own = at_site(key, i)

            def run(x):
                return x + jdropout.dropout(at_site(own, "mlp"), x, 0.25)

            return layer_drop(own, run, x, 0.5), None

        x, _ = lax.scan(body, x, jnp.arange(3))
        c, h = zoneout(at_site(key, "lstm"), (x, x), (x, x), (0.5, 0.125))
        return layer_drop(None, layer, c + h, 0.5, deterministic=True)

    report = jdropout.audit(step, key, jnp.ones((4, 8)), 3)
    assert [(site.kind, site.rate, site.deterministic) for site in report.sites] == [
        ("layer_drop", 0.5, False),
        ("dropout", 0.25, False),
        ("zoneout", 0.5, False),
        ("zoneout", 0.125, False),
        ("layer_drop", 0.5, True),
    ]
    assert report.sites[0].shape == ()
    assert report.sites[1].loops == ("scan of 3",)
    assert not report.findings
    again = jdropout.audit(lambda k, x: zoneout(k, x, zoneout(k, x, x, 0.5), 0.5), key, X)
    assert "key-reused" in [finding.code for finding in again.findings]


def test_one_key_in_two_layers_is_reported_by_jax():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        # Rates of their own: the checker of JAX 0.8 sees nothing of what was compiled before.
        layer_drop(key, layer, X, 0.65625)
        with pytest.raises(jax.errors.KeyReuseError):
            zoneout(key, X, X, 0.65625)


def test_statistics_reject_what_they_should():
    """The bound is that of a normal distribution: 64 scores exceed it with 1e-8."""
    assert math.isclose(64 * 2 * stats.norm.sf(bound(64)), FALSE_ALARM, rel_tol=1e-6)
