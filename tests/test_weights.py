"""DropConnect and targeted dropout: the formulas of the papers, masks of the law, all trees."""

import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify
from scipy import stats

import jdropout
from jdropout._weights import drop_connect, drop_connect_tree, targeted_dropout
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""


def words(key):
    return np.asarray(jax.random.key_data(key))


def residuals(function, x):
    return [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if hasattr(leaf, "dtype")]


def binomial_p_value(successes, n, probability):
    law = stats.binom(n, probability)
    return min(1, 2 * min(law.cdf(successes), law.sf(successes - 1)))


# --- drop_connect -------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_drop_connect_is_the_masked_weights_by_the_twins_mask(scaled, key):
    w = jax.random.normal(jax.random.key(1), (37, 11))
    mask = law_twin.keep_mask(words(key), 0.3, w.shape)
    scale = np.float32(1 / (1 - jdropout.effective_rate(0.3))) if scaled else np.float32(1)
    y = drop_connect(key, w, 0.3, scaled=scaled)
    np.testing.assert_array_equal(y, np.where(mask, np.asarray(w) * scale, 0))
    gradient = jax.grad(lambda w: drop_connect(key, w, 0.3, scaled=scaled).sum())(w)
    np.testing.assert_array_equal(gradient, np.where(mask, scale, 0))


def test_drop_connect_takes_a_block_and_shared_axes(key):
    w = jnp.ones((24, 10))
    options = dict(broadcast_dims=(1,), precision=32)
    whole = drop_connect(key, w, 0.4, **options)
    block = drop_connect(key, w[8:20], 0.4, start=(8, 0), global_shape=w.shape, **options)
    np.testing.assert_array_equal(block, whole[8:20])
    np.testing.assert_array_equal(whole, jnp.broadcast_to(whole[:, :1], w.shape))


def test_drop_connect_returns_the_weights_in_evaluation_and_zeros_at_rate_one():
    w = jnp.full((3, 2), jnp.nan)
    assert drop_connect(None, w, 0.5, deterministic=True) is w
    assert drop_connect(None, w, 0.0) is w
    np.testing.assert_array_equal(drop_connect(None, w, 1.0), np.zeros((3, 2)))


def test_drop_connect_traces_rates_and_flags_and_stores_the_key(key):
    w = jnp.ones((20, 8))
    f = jax.jit(lambda rate, flag: drop_connect(key, w, rate, deterministic=flag))
    np.testing.assert_array_equal(f(0.25, False), drop_connect(key, w, 0.25))
    np.testing.assert_array_equal(f(0.25, True), w)
    np.testing.assert_array_equal(f(1.0, False), np.zeros_like(w))
    assert jnp.isnan(f(1.5, False)).all()
    (leaf,) = residuals(lambda w: drop_connect(key, w, 0.25), w)
    np.testing.assert_array_equal(leaf, words(key))


def layer_moments(scaled):
    """z-score of the mean of a linear unit, and p-value of its variance; n = 2^16 masks.

    Of y = sum_i w_i m_i x_i / keep the paper's moments (section 3.2), here of the scaled layer:
    mean w . x, and variance sum_i (w_i x_i)^2 rate / keep.
    """
    n, rate = 1 << 16, 0.4
    keys = jax.random.split(jax.random.key(2), n)
    w, x = jnp.linspace(-1, 1, 24).reshape(24, 1), jnp.linspace(0.5, 2, 24).reshape(1, 24)
    y = jax.vmap(lambda k: x @ drop_connect(k, w, rate, scaled=scaled))(keys)
    y = np.asarray(y, np.float64).reshape(-1)
    rate = jdropout.effective_rate(rate)
    terms = np.asarray(w, np.float64).reshape(-1) * np.asarray(x, np.float64).reshape(-1)
    variance = (terms**2).sum() * rate / (1 - rate)
    z_mean = (y.mean() - terms.sum()) / math.sqrt(variance / n)
    # y is a sum of 24 bounded terms: near to normal, so that its variance has this deviation.
    z_variance = (((y - terms.sum()) ** 2).mean() / variance - 1) / math.sqrt(2 / n)
    return z_mean, z_variance


def test_a_layers_output_has_the_mean_and_variance_of_the_paper():
    """n = 2^16 masks; false alarm 1e-8 (two z-scores, each beyond 5.9 with 4e-9)."""
    bound = stats.norm.isf(FALSE_ALARM / 4)
    assert max(map(abs, layer_moments(True))) < bound
    assert max(map(abs, layer_moments(False))) > bound  # the control: nothing is scaled


# --- trees --------------------------------------------------------------------------------

PARAMS = {
    "lstm": {"kernel": jnp.ones((6, 8)), "recurrent_kernel": jnp.ones((8, 8))},
    "layers": [{"kernel": jnp.ones((8, 3))}, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}],
    "steps": jnp.int32(3),
}


def test_only_selected_leaves_are_dropped_each_with_the_key_of_its_path(key):
    dropped = drop_connect_tree(key, PARAMS, 0.4, select=["recurrent_kernel", "1/kernel"])
    sites = {
        ("lstm", "recurrent_kernel"): dropped["lstm"]["recurrent_kernel"],
        ("layers", 1, "kernel"): dropped["layers"][1]["kernel"],
    }
    scale = np.float32(1 / (1 - jdropout.effective_rate(0.4)))
    for site, leaf in sites.items():
        mask = law_twin.keep_mask(words(at_site(key, site)), 0.4, leaf.shape)
        np.testing.assert_array_equal(leaf, np.where(mask, scale, 0))
    assert dropped["lstm"]["kernel"] is PARAMS["lstm"]["kernel"]
    assert dropped["layers"][0]["kernel"] is PARAMS["layers"][0]["kernel"]
    assert dropped["steps"] is PARAMS["steps"]


@pytest.mark.parametrize(
    ("select", "paths"),
    [
        (["kernel"], {"lstm/kernel", "layers/0/kernel", "layers/1/kernel"}),
        (["lstm/kernel"], {"lstm/kernel"}),
        (("0/kernel", "bias"), {"layers/0/kernel", "layers/1/bias"}),
        (lambda path: path.startswith("lstm/"), {"lstm/kernel", "lstm/recurrent_kernel"}),
        (lambda path: "0" in path, {"layers/0/kernel"}),
    ],
)
def test_names_match_the_ends_of_paths_and_predicates_see_whole_paths(select, paths):
    zeroed = drop_connect_tree(None, PARAMS, 1.0, select=select)
    leaves = jax.tree.flatten_with_path(zeroed)[0]
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if not leaf.any()
    }
    assert names == paths


def test_the_tree_is_returned_itself_in_evaluation_and_at_rate_zero():
    for options in (dict(rate=0.5, deterministic=True), dict(rate=0.0)):
        assert drop_connect_tree(None, PARAMS, select=["kernel"], **options) is PARAMS


def test_a_masks_leaf_does_not_depend_on_the_rest_of_the_tree(key):
    alone = {"lstm": {"kernel": PARAMS["lstm"]["kernel"]}}
    whole = drop_connect_tree(key, PARAMS, 0.4, select=["kernel"])
    part = drop_connect_tree(key, alone, 0.4, select=["kernel"])
    np.testing.assert_array_equal(part["lstm"]["kernel"], whole["lstm"]["kernel"])


class Network(nnx.Module):
    def __init__(self, rngs):
        self.lstm = nnx.OptimizedLSTMCell(3, 4, rngs=rngs)


def test_an_nnx_state_and_its_dictionary_have_the_same_paths_and_masks(key):
    state = nnx.state(Network(nnx.Rngs(0)), nnx.Param)
    select = ["dense_h/kernel"]
    dropped = drop_connect_tree(key, state, 0.5, select=select)
    assert isinstance(dropped, nnx.State)
    pure = drop_connect_tree(key, nnx.to_pure_dict(state), 0.5, select=select)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(dropped), pure)
    kernel = nnx.to_pure_dict(state)["lstm"]["dense_h"]["kernel"]
    own = at_site(key, ("lstm", "dense_h", "kernel"))
    np.testing.assert_array_equal(pure["lstm"]["dense_h"]["kernel"], drop_connect(own, kernel, 0.5))
    model = Network(nnx.Rngs(0))
    nnx.update(model, dropped)
    assert (model.lstm.dense_h.kernel[...] == 0).any()
    assert (model.lstm.dense_i.kernel[...] != 0).all()


def test_linen_parameters_are_dropped_and_gradients_reach_what_is_kept(key):
    cell = linen.OptimizedLSTMCell(4)
    carry, x = (jnp.ones((1, 4)), jnp.ones((1, 4))), jnp.ones((1, 3))
    params = cell.init(jax.random.key(0), carry, x)

    @jax.jit
    def loss(params, rate):
        dropped = drop_connect_tree(
            key, params, rate, select=lambda path: re.search("h./kernel$", path) is not None
        )
        return cell.apply(dropped, carry, x)[1].sum()

    gradients = jax.grad(loss)(params, 0.5)["params"]
    for name in ("hi", "hf", "hg", "ho"):
        mask = np.asarray(jdropout.keep_mask(at_site(key, ("params", name, "kernel")), 0.5, (4, 4)))
        np.testing.assert_array_equal(np.asarray(gradients[name]["kernel"]) != 0, mask)
    assert (gradients["ii"]["kernel"] != 0).all()
    np.testing.assert_allclose(loss(params, 0.0), cell.apply(params, carry, x)[1].sum(), rtol=1e-5)


def test_a_tree_under_vmap_over_keys_equals_the_loop(key):
    keys = jax.random.split(key, 3)

    def f(key):
        return drop_connect_tree(key, PARAMS, 0.4, select=["kernel"])["layers"][0]["kernel"]

    np.testing.assert_array_equal(jax.vmap(f)(keys), jnp.stack([f(k) for k in keys]))


ERRORS = {
    "name": (dict(select="kernel"), TypeError, "Write ('recurrent_kernel',) for one name"),
    "number": (dict(select=3), TypeError, "a function of a path or a sequence of names, got 3"),
    "numbers": (dict(select=[3]), TypeError, "select must hold names"),
    "unknown": (
        dict(select=["kernel", "kernels"]),
        ValueError,
        "'kernels' selects none of 'layers/0/kernel', 'layers/1/bias'",
    ),
    "part of a name": (dict(select=["ernel"]), ValueError, "'ernel' selects none of"),
    "no names": (dict(select=[]), ValueError, "select must select parameters, but ()"),
    "nothing": (dict(select=lambda path: False), ValueError, "selects none of"),
    "integers": (dict(select=["steps"]), TypeError, "params 'steps' must be a floating-point"),
    "one array": (dict(params=jnp.ones(3)), ValueError, "Use jdropout.drop_connect for it"),
    "no parameters": (dict(params={}), ValueError, "selects none of no parameters"),
    "key": (dict(key=None), ValueError, "key is None"),
    "rate": (dict(rate=2.0), ValueError, "rate must be in [0, 1], got 2.0"),
    "flag": (dict(deterministic=0), TypeError, "deterministic must be"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_trees_name_the_argument_and_the_fix(case, key):
    changes, error, text = ERRORS[case]
    arguments = dict(key=key, params=PARAMS, rate=0.5, select=["kernel"]) | changes
    with pytest.raises(error, match=re.escape(text)):
        drop_connect_tree(**arguments)


def test_errors_of_drop_connect_name_its_argument(key):
    with pytest.raises(TypeError, match="w must be a floating-point or complex array, got dtype"):
        drop_connect(key, jnp.arange(3), 0.5)


# --- targeted_dropout ---------------------------------------------------------------------


def candidates(w, fraction, unit_axis=None, output_axis=-1):
    """By NumPy and a plain loop over units."""
    w = np.asarray(w)
    if unit_axis is not None:
        first = np.moveaxis(w, unit_axis, 0).reshape(w.shape[unit_axis], -1)
        order = np.argsort((np.abs(first).astype(np.float64) ** 2).sum(1), kind="stable")
        chosen = np.zeros(w.shape[unit_axis], bool)
        chosen[order[: math.floor(fraction * w.shape[unit_axis] + 1e-6)]] = True
        shape = [-1 if a == unit_axis % w.ndim else 1 for a in range(w.ndim)]
        return np.broadcast_to(chosen.reshape(shape), w.shape)
    chosen = np.zeros(w.shape, bool)
    units, weights = (np.moveaxis(a, output_axis, 0) for a in (chosen, w))
    for i in range(len(units)):
        flat = np.abs(weights[i]).reshape(-1)
        one = np.zeros(flat.size, bool)
        one[np.argsort(flat, kind="stable")[: math.floor(fraction * flat.size + 1e-6)]] = True
        units[i] = one.reshape(units[i].shape)
    return chosen


SHAPES = [((37, 10), 0), ((3, 3, 5, 7), -1), ((3, 5, 4), 1), ((1, 6), 1)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("whole", [False, True], ids=["weights", "units"])
def test_targeted_dropout_zeroes_the_candidates_that_the_twins_mask_drops(shape, axis, whole, key):
    w = jax.random.normal(jax.random.key(1), shape)
    options = dict(unit_axis=axis) if whole else dict(output_axis=axis)
    shared = [a for a in range(len(shape)) if a != axis % len(shape)] if whole else []
    mask = law_twin.keep_mask(words(key), 0.6, shape, broadcast_dims=shared)
    for fraction in (0.25,) if whole else (0.5, 1.0):
        chosen = candidates(w, fraction, **options)
        y = targeted_dropout(key, w, 0.6, target_fraction=fraction, **options)
        np.testing.assert_array_equal(y, np.where(chosen & ~mask, 0, w))
        pruned = targeted_dropout(None, w, 1.0, target_fraction=fraction, **options)
        np.testing.assert_array_equal(pruned, np.where(chosen, 0, w))


@pytest.mark.parametrize("n", [7, 100])
@pytest.mark.parametrize("fraction", [0.0, 0.29, 1 / 7, 0.999, 1, np.float32(0.1)])
def test_exactly_the_stated_number_of_candidates_even_among_equals(fraction, n):
    w = jnp.ones((n, 2))
    pruned = np.asarray(targeted_dropout(None, w, 1.0, target_fraction=fraction))
    count = math.floor(float(fraction) * n + 1e-6)
    np.testing.assert_array_equal(pruned[:, 0] == 0, np.arange(n) < count)  # the first of equals
    np.testing.assert_array_equal(pruned[:, 0], pruned[:, 1])
    units = np.asarray(targeted_dropout(None, w, 1.0, target_fraction=fraction, unit_axis=0))
    np.testing.assert_array_equal(units, pruned)


def test_signs_do_not_count_and_nan_is_no_candidate_before_numbers():
    w = jnp.array([[-1.0], [jnp.nan], [2.0], [-jnp.inf], [0.5]])
    pruned = targeted_dropout(None, w, 1.0, target_fraction=0.6)
    np.testing.assert_array_equal(pruned, [[0], [jnp.nan], [0], [-jnp.inf], [0]])


def test_the_chosen_weights_do_not_depend_on_dtype(key):
    w = jax.random.normal(jax.random.key(1), (64, 9)).astype(jnp.bfloat16)
    expected = targeted_dropout(key, w, 0.5, target_fraction=0.5)
    for dtype in (jnp.float32, jnp.complex64):
        y = targeted_dropout(key, w.astype(dtype), 0.5, target_fraction=0.5)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y) == 0, np.asarray(expected) == 0)
    small = w.astype(jnp.float8_e4m3fn)
    assert targeted_dropout(key, small, 0.5, target_fraction=0.5).dtype == small.dtype


@pytest.mark.parametrize("options", [{}, {"unit_axis": 1}], ids=["weights", "units"])
def test_gradients_pass_to_what_is_kept_and_the_key_is_all_that_is_stored(options, key):
    w = jax.random.normal(jax.random.key(1), (32, 8))

    def f(w):
        return targeted_dropout(key, w, 0.7, target_fraction=0.5, **options)

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        y, pullback = jax.vjp(wrap(f), w)
        kept = np.asarray(y) != 0
        assert 0 < kept.sum() < kept.size
        np.testing.assert_array_equal(pullback(w * jnp.inf)[0], np.where(kept, w * jnp.inf, 0))
        np.testing.assert_array_equal(jax.jvp(wrap(f), (w,), (w,))[1], y)
    leaves = residuals(f, w)
    assert sum(leaf.size for leaf in leaves if leaf.shape != w.shape) == 2
    for leaf in leaves:  # besides the key the weights themselves, which are there anyway
        np.testing.assert_array_equal(leaf, w if leaf.shape == w.shape else words(key))


def test_evaluation_and_fractions_or_rates_of_zero_return_the_weights_themselves(key):
    w = jnp.full((4, 3), jnp.nan)
    assert targeted_dropout(None, w, 0.5, target_fraction=0.5, deterministic=True) is w
    assert targeted_dropout(None, w, 0.0, target_fraction=0.5) is w
    assert targeted_dropout(key, w, 0.5, target_fraction=0.2) is w  # no whole weight of four


def test_traced_rates_and_flags_equal_static_ones_and_bad_rates_give_nan(key):
    w = jax.random.normal(jax.random.key(1), (16, 6))

    @jax.jit
    def f(rate, flag):
        return targeted_dropout(key, w, rate, target_fraction=0.5, deterministic=flag)

    np.testing.assert_array_equal(
        f(0.25, False), targeted_dropout(key, w, 0.25, target_fraction=0.5)
    )
    np.testing.assert_array_equal(
        f(1.0, False), targeted_dropout(None, w, 1.0, target_fraction=0.5)
    )
    np.testing.assert_array_equal(f(0.0, False), w)
    np.testing.assert_array_equal(f(0.9, True), w)
    assert jnp.isnan(f(-0.5, False)).all()
    assert f._cache_size() == 1
    with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
        checkify.checkify(f, errors=checkify.user_checks)(1.5, False)[0].throw()
    assert jax.grad(lambda rate: f(rate, False).sum())(0.5) == 0


def test_targeted_dropout_under_vmap_equals_the_loop(key):
    keys = jax.random.split(key, 3)
    w = jax.random.normal(key, (3, 12, 5))
    rates = jnp.array([0.2, 0.5, 0.9])

    def f(key, w, rate):
        return targeted_dropout(key, w, rate, target_fraction=0.5)

    loop = jnp.stack([f(*args) for args in zip(keys, w, rates, strict=True)])
    np.testing.assert_array_equal(jax.vmap(f)(keys, w, rates), loop)


def test_sharded_weights_have_the_same_candidates(key):
    w = jax.random.normal(key, (64, 16))
    expected = targeted_dropout(key, w, 0.5, target_fraction=0.5)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            placed = jax.device_put(w, jax.NamedSharding(mesh, jax.P("a", "b")))
            y = jax.jit(lambda w: targeted_dropout(key, w, 0.5, target_fraction=0.5))(placed)
            np.testing.assert_array_equal(y, expected)


def test_candidates_are_dropped_at_the_rate_and_others_never():
    """n = 2^18 candidates; false alarm 1e-8. Of all weights rate * fraction are dropped."""
    w = jax.random.normal(jax.random.key(3), (1024, 512))
    dropped = np.asarray(targeted_dropout(jax.random.key(4), w, 0.3, target_fraction=0.5)) == 0
    chosen = candidates(w, 0.5)
    assert chosen.sum() == 1 << 18
    assert not (dropped & ~chosen).any()
    rate = jdropout.effective_rate(0.3)
    assert binomial_p_value(dropped.sum(), 1 << 18, rate) > FALSE_ALARM
    assert binomial_p_value(dropped.sum(), 1 << 18, rate + 0.007) < FALSE_ALARM  # the control


TARGETED_ERRORS = {
    "fraction above one": (dict(target_fraction=1.5), ValueError, "must be in [0, 1], got 1.5"),
    "fraction NaN": (dict(target_fraction=math.nan), ValueError, "got nan"),
    "fraction bool": (dict(target_fraction=True), TypeError, "must be a number, got True"),
    "fraction array": (dict(target_fraction=jnp.float32(0.5)), TypeError, "Python number"),
    "vector": (dict(w=jnp.ones(4)), ValueError, "pass unit_axis=0"),
    "unit_axis": (dict(unit_axis=2), ValueError, "unit_axis is 2, but the array has 2 axes"),
    "output_axis": (dict(output_axis=-3), ValueError, "output_axis is -3"),
    "integers": (dict(w=jnp.ones((2, 2), int)), TypeError, "w must be a floating-point"),
    "key": (dict(key=None), ValueError, "key is None"),
    "rate": (dict(rate=-1.0), ValueError, "rate must be in [0, 1], got -1.0"),
}


@pytest.mark.parametrize("case", TARGETED_ERRORS)
def test_errors_of_targeted_dropout_name_the_argument_and_the_fix(case, key):
    changes, error, text = TARGETED_ERRORS[case]
    arguments = dict(key=key, w=jnp.ones((4, 2)), rate=0.5, target_fraction=0.5) | changes
    with pytest.raises(error, match=re.escape(text)):
        targeted_dropout(**arguments)


# --- audit --------------------------------------------------------------------------------


def test_an_audit_sees_every_weight_that_is_dropped(key):
    def step(key, params, step):
        key = jax.random.fold_in(key, step)
        params = drop_connect_tree(key, params, 0.5, select=["kernel"])
        w = targeted_dropout(
            at_site(key, "w"), jnp.ones((4, 4)), 0.25, target_fraction=0.5, unit_axis=1
        )
        return params["lstm"]["kernel"].sum() + w.sum()

    report = jdropout.audit(step, key, PARAMS, 3)
    kinds = [site.kind for site in report.sites]
    assert kinds == ["drop_connect"] * 3 + ["targeted_dropout"]
    assert len({site.key for site in report.sites}) == 4
    assert not report.findings


def test_one_key_used_twice_is_reported_by_jax():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        targeted_dropout(key, jnp.ones((4, 4)), 0.5, target_fraction=0.5)
        with pytest.raises(jax.errors.KeyReuseError):
            targeted_dropout(key, jnp.ones((4, 4)), 0.5, target_fraction=0.5)
