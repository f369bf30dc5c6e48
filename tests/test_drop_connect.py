"""DropConnect, on arrays and in trees: what is dropped, and with which key."""

import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import quick_jit
from flax import linen, nnx
from scipy import stats

import jdropout
from jdropout import drop_connect, drop_connect_tree
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""


def words(key):
    return np.asarray(jax.random.key_data(key))


# --- drop_connect -------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_drop_connect_masks_weights_by_the_twins_mask_scaled_or_not(scaled, key):
    def drop(key, w):
        y = drop_connect(key, w, 0.3, scaled=scaled)
        return y.sum(), y

    w = np.random.default_rng(1).standard_normal((37, 11), np.float32)
    mask = law_twin.keep_mask(words(key), 0.3, w.shape)
    scale = np.float32(1 / (1 - jdropout.effective_rate(0.3))) if scaled else np.float32(1)
    both = quick_jit(jax.value_and_grad(lambda w, key: drop(key, w), has_aux=True))
    (_, y), gradient = both(w, key)
    np.testing.assert_array_equal(y, np.where(mask, w * scale, 0))
    np.testing.assert_array_equal(gradient, np.where(mask, scale, 0))


def test_drop_connect_takes_a_block_and_shared_axes(key):
    w = jnp.ones((24, 10))
    options = dict(broadcast_dims=(1,), precision=32)
    whole = drop_connect(key, w, 0.4, **options)
    block = drop_connect(key, w[8:20], 0.4, start=(8, 0), global_shape=w.shape, **options)
    np.testing.assert_array_equal(block, whole[8:20])
    np.testing.assert_array_equal(whole, jnp.broadcast_to(whole[:, :1], w.shape))


def layer_moments(scaled):
    """z-score of the mean of a linear unit, and p-value of its variance; n = 2^16 masks.

    Of y = sum_i w_i m_i x_i / keep the paper's moments (section 3.2), here of the scaled layer:
    mean w . x, and variance sum_i (w_i x_i)^2 rate / keep.
    """
    n, rate = 1 << 16, 0.4
    keys = jax.random.split(jax.random.key(2), n)
    w, x = jnp.linspace(-1, 1, 24).reshape(24, 1), jnp.linspace(0.5, 2, 24).reshape(1, 24)
    y = jax.jit(jax.vmap(lambda k: x @ drop_connect(k, w, rate, scaled=scaled)))(keys)
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
    "lstm": {"kernel": jnp.ones((8, 8)), "recurrent_kernel": jnp.ones((8, 8))},
    "layers": [{"kernel": jnp.ones((8, 8))}, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}],
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
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, x)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)

    def loss(params, rate):
        dropped = drop_connect_tree(
            key, params, rate, select=lambda path: re.search("h./kernel$", path) is not None
        )
        return cell.apply(dropped, carry, x)[1].sum()

    @quick_jit
    def passes(params, rate):
        value, gradient = jax.value_and_grad(loss)(params, rate)
        return value, gradient["params"], cell.apply(params, carry, x)[1].sum()

    _, gradients, _ = passes(params, 0.5)
    for name in ("hi", "hf", "hg", "ho"):
        own = law_twin.at_site(words(key), ("params", name, "kernel"))
        mask = law_twin.keep_mask(own, 0.5, (4, 4))
        np.testing.assert_array_equal(np.asarray(gradients[name]["kernel"]) != 0, mask)
    assert (gradients["ii"]["kernel"] != 0).all()
    value, _, undropped = passes(params, 0.0)
    np.testing.assert_allclose(value, undropped, rtol=1e-5)


def test_a_tree_under_vmap_over_keys_equals_the_loop(key):
    keys = jax.random.split(key, 3)

    def f(key):
        return drop_connect_tree(key, PARAMS, 0.4, select=["kernel"])["layers"][0]["kernel"]

    for key, y in zip(keys, jax.jit(jax.vmap(f))(keys), strict=True):
        np.testing.assert_array_equal(y, f(key))


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
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_trees_name_the_argument_and_the_fix(case, key):
    changes, error, text = ERRORS[case]
    arguments = dict(key=key, params=PARAMS, rate=0.5, select=["kernel"]) | changes
    with pytest.raises(error, match=re.escape(text)):
        drop_connect_tree(**arguments)


def test_an_audit_sees_every_weight_that_is_dropped(key):
    def step(key, params, step):
        key = jax.random.fold_in(key, step)
        return drop_connect_tree(key, params, 0.5, select=["kernel"])["lstm"]["kernel"].sum()

    report = jdropout.audit(step, key, PARAMS, 3)
    assert [site.kind for site in report.sites] == ["drop_connect"] * 3
    assert len({site.key for site in report.sites}) == 3
    assert not report.findings
