"""LayerDrop: which layers run, what they give and what they store."""

import functools
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import normal
from jax import lax
from scipy import stats

import jdropout
from jdropout import layer_drop, zoneout
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
    expected = x + np.sin(x)
    for key in kept:
        np.testing.assert_allclose(f(key), expected, rtol=1e-6)
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


def test_an_unbiased_layer_takes_traced_rates_and_flags():
    x = jnp.linspace(-1, 1, 6)
    traces = []

    @jax.jit
    def f(key, rate, flag):
        def counted(x):
            traces.append(x)
            return layer(x)

        def drop(rate):
            return layer_drop(key, counted, x, rate, deterministic=flag, unbiased=True)

        y, pullback = jax.vjp(drop, rate)
        return y, *pullback(jnp.ones_like(y))

    kept, dropped = keys_by_fate()
    for key in (kept[0], dropped[0]):
        np.testing.assert_allclose(f(key, 0.0, False)[0], layer(x), rtol=1e-6)
        np.testing.assert_allclose(f(key, 0.5, True)[0], layer(x), rtol=1e-6)
        np.testing.assert_array_equal(f(key, 1.0, False)[0], x)
        assert jnp.isnan(f(key, 1.5, False)[0]).all()
    y, rate_bar = f(kept[0], 0.5, False)
    np.testing.assert_allclose(y, x + 2 * jnp.sin(x), rtol=1e-6)
    assert rate_bar == 0
    np.testing.assert_array_equal(f(dropped[0], 0.5, False)[0], x)
    assert len(traces) == 1


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
    weights = np.asarray(normal(DEPTH, 8, 8)) / 8
    return np.ones((4, 8), np.float32), weights, np.linspace(0.0, 0.9, DEPTH, dtype=np.float32)


def kept_of(key, rates):
    """Which layers of the stack the twin keeps."""
    keys = [words(at_site(key, i)) for i in range(DEPTH)]
    return [
        bool(law_twin.keep_mask(key, float(rate), (), precision=16))
        for key, rate in zip(keys, rates, strict=True)
    ]


def test_a_scan_over_layers_runs_those_that_are_kept_at_their_own_rates(key):
    x, weights, rates = stack_inputs()
    kept = kept_of(key, rates)
    assert 1 < sum(kept) < DEPTH
    runs = []
    y = jax.jit(functools.partial(stack, runs=runs))(key, x, weights, rates)
    y.block_until_ready()
    jax.effects_barrier()
    assert len(runs) == sum(kept)
    expected = x
    for w, m in zip(weights, kept, strict=True):
        expected = expected + np.tanh(expected @ w) if m else expected
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_gradients_through_a_scan_are_those_of_the_layers_that_were_kept(key):
    x, weights, rates = stack_inputs()
    kept = kept_of(key, rates)

    def chosen(weights):
        y = x
        for w, m in zip(weights, kept, strict=True):
            y = y + jnp.tanh(y @ w) if m else y
        return y.sum()

    @jax.jit
    def gradients(weights):
        return jax.grad(lambda w: stack(key, x, w, rates).sum())(weights), jax.grad(chosen)(weights)

    gradient, expected = map(np.asarray, gradients(weights))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert [bool(g.any()) for g in gradient] == kept


def test_the_layers_products_are_inside_conditionals_of_the_gradients_program(key):
    w = jnp.ones((64, 64))

    def f(x):
        return layer_drop(key, lambda x: x + jnp.tanh(x @ w), x, 0.5).sum()

    def entry(function):
        text = jax.jit(function).lower(jnp.ones((64, 64))).compile().as_text()
        assert " dot(" in text or "matmul" in text or "dot" in text
        start = text.index("\nENTRY ")
        return text[start:]

    program = entry(jax.grad(f))
    assert "conditional(" in program
    assert " dot(" not in program

    def selected(x):  # the control: a product that is always taken
        y = x + jnp.tanh(x @ w)
        return jnp.where(jdropout.keep_mask(key, 0.5, ()), y, x).sum()

    control = entry(jax.grad(selected))
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
    keys, x = jnp.stack([kept[0], dropped[0]]), np.ones((2, 3), np.float32)
    y = jax.jit(jax.vmap(lambda k, x: layer_drop(k, layer, x, 0.5)))(keys, x)
    np.testing.assert_allclose(y, np.stack([x[0] + np.sin(x[0]), x[1]]), rtol=1e-6)

    def program(in_axes, key):
        f = jax.vmap(lambda k, x: layer_drop(k, layer, x, 0.5), in_axes=in_axes)
        return str(jax.make_jaxpr(f)(key, x))

    assert " cond[" not in program((0, 0), keys)
    assert " cond[" in program((None, 0), keys[0])


def test_the_mean_over_masks_is_the_formulas():
    """n = 2^12 decisions, one z-score each; false alarm 1e-8."""
    keys, rate = jax.random.split(jax.random.key(9), 1 << 12), jdropout.effective_rate(0.3)
    x = np.full(1, 2.0, np.float32)
    update = np.sin(2.0)

    @jax.jit
    @jax.vmap
    def both(key):
        return [layer_drop(key, layer, x, 0.3, unbiased=unbiased) for unbiased in (False, True)]

    biased, unbiased = both(keys)

    def score(y, mean, factor=1.0):
        return abs(z_scores(y, mean, rate * (1 - rate) * (factor * update) ** 2).item())

    evaluation = 2.0 + update
    assert score(biased, 2.0 + (1 - rate) * update) < bound(1)
    assert score(biased, evaluation) > bound(1)  # the control: its mean is not its evaluation
    assert score(unbiased, evaluation, 1 / (1 - rate)) < bound(1)


X = jnp.ones((3, 4))
LAYER_ERRORS = {
    "layer": (dict(layer=3), TypeError, "layer must be a function, got int"),
    "shape": (dict(layer=lambda x: x[:2]), ValueError, "float32[3, 4], got float32[2, 4]"),
    "dtype": (dict(layer=lambda x: x.astype(jnp.bfloat16)), ValueError, "got bfloat16[3, 4]"),
    "structure": (dict(layer=lambda x: (x, x)), ValueError, "structure of its input"),
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


def test_an_audit_sees_layers_and_the_dropout_inside_of_them(key):
    def step(key, x, step):
        key = jax.random.fold_in(key, step)

        def body(x, i):
            own = at_site(key, i)

            def run(x):
                return x + jdropout.dropout(at_site(own, "mlp"), x, 0.25)

            return layer_drop(own, run, x, 0.5), None

        x, _ = lax.scan(body, x, jnp.arange(3))
        return layer_drop(None, layer, x, 0.5, deterministic=True)

    report = jdropout.audit(step, key, jnp.ones((4, 8)), 3)
    assert [(site.kind, site.rate, site.deterministic) for site in report.sites] == [
        ("layer_drop", 0.5, False),
        ("dropout", 0.25, False),
        ("layer_drop", 0.5, True),
    ]
    assert report.sites[0].shape == ()
    assert report.sites[1].loops == ("scan of 3",)
    (finding,) = report.findings
    assert (finding.code, finding.sites) == ("off-while-others-are-on", (2,))


def test_one_key_in_two_layers_is_reported_by_jax():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        # Rates of their own: the checker of JAX 0.8 sees nothing of what was compiled before.
        layer_drop(key, layer, X, 0.65625)
        with pytest.raises(jax.errors.KeyReuseError):
            zoneout(key, X, X, 0.65625)
