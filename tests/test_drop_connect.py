"""DropConnect, on arrays and in trees: what is dropped, and with which key."""

import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import UNIFORM
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


def test_unscaled_weights_are_kept_as_they_are(key):
    @jax.jit
    def both(w):
        y, pullback = jax.vjp(lambda w: drop_connect(key, w, 0.3, scaled=False), w)
        return y, *pullback(jnp.ones_like(y))

    w = np.random.default_rng(1).standard_normal((37, 11), np.float32)
    mask = law_twin.keep_mask(words(key), 0.3, w.shape)
    y, gradient = both(w)
    np.testing.assert_array_equal(y, np.where(mask, w, 0))
    np.testing.assert_array_equal(gradient, mask)


def test_weights_may_share_their_masks_along_an_axis(key):
    w = np.ones((24, 10), np.float32)
    dropped = np.asarray(drop_connect(key, w, 0.4, broadcast_dims=(1,)))
    mask = law_twin.keep_mask(words(key), 0.4, w.shape, broadcast_dims=(1,))
    np.testing.assert_array_equal(dropped != 0, mask)


def layer_moments():
    """z-scores of the mean and the variance of a linear unit, scaled and not; n = 2^16 masks.

    Of y = sum_i w_i m_i x_i / keep the paper's moments (section 3.2), here of the scaled layer:
    mean w . x, and variance sum_i (w_i x_i)^2 rate / keep.
    """
    n, rate = 1 << 16, 0.4
    keys = jax.random.split(jax.random.key(2), n)
    w = np.linspace(-1, 1, 24, dtype=np.float32)[:, None]
    x = np.linspace(0.5, 2, 24, dtype=np.float32)[None]

    @jax.jit
    @jax.vmap
    def units(key):
        return [x @ drop_connect(key, w, rate, scaled=scaled) for scaled in (True, False)]

    effective = jdropout.effective_rate(rate)
    terms = np.asarray(w, np.float64).reshape(-1) * np.asarray(x, np.float64).reshape(-1)
    variance = (terms**2).sum() * effective / (1 - effective)
    for y in units(keys):
        y = np.asarray(y, np.float64).reshape(-1)
        z_mean = (y.mean() - terms.sum()) / math.sqrt(variance / n)
        # A sum of 24 bounded terms: near to normal, so that its variance has this deviation.
        z_variance = (((y - terms.sum()) ** 2).mean() / variance - 1) / math.sqrt(2 / n)
        yield z_mean, z_variance


def test_a_layers_output_has_the_mean_and_variance_of_the_paper():
    """n = 2^16 masks; false alarm 1e-8 (two z-scores, each beyond 5.9 with 4e-9)."""
    bound = stats.norm.isf(FALSE_ALARM / 4)
    scaled, unscaled = layer_moments()
    assert max(map(abs, scaled)) < bound
    assert max(map(abs, unscaled)) > bound  # the control


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
        self.lstm = nnx.OptimizedLSTMCell(
            3, 4, kernel_init=UNIFORM, recurrent_kernel_init=UNIFORM, rngs=rngs
        )


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
    h, x = np.ones((1, 4), np.float32), np.ones((1, 3), np.float32)
    carry = (h, h)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, x)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)

    @jax.jit
    @jax.grad
    def gradient(params):
        dropped = drop_connect_tree(
            key, params, 0.5, select=lambda path: re.search("h./kernel$", path) is not None
        )
        return cell.apply(dropped, carry, x)[1].sum()

    gradients = gradient(params)["params"]
    for name in ("hi", "hf", "hg", "ho"):
        own = law_twin.at_site(words(key), ("params", name, "kernel"))
        mask = law_twin.keep_mask(own, 0.5, (4, 4))
        np.testing.assert_array_equal(np.asarray(gradients[name]["kernel"]) != 0, mask)
    assert (np.asarray(gradients["ii"]["kernel"]) != 0).all()


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
