"""Subsets of exact size: the law, and the functions that compute only what it keeps."""

import functools
import itertools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx
from jax import lax
from scipy import stats

import jdropout
import jdropout.nnx
from jdropout import keep_indices, layer_subset, route_tokens, stochastic_depth, unit_subset
from jdropout._subset import _indices

KEY = jax.random.key(20140614)
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_subsets.json").read_text())
FALSE_ALARM = 1e-6


def words(key):
    return np.asarray(jax.random.key_data(key))


def twin(size, rate, groups=1, shape=(), key=KEY):
    return law_twin.keep_indices(words(key), rate, size, groups, shape)


X = normal(4, 6, 3)
PARAMS = normal(4, 1, 1, 3, seed=1)
KERNELS = normal(3, 8, seed=2), normal(8, 3, seed=3)


# --- the law ------------------------------------------------------------------------------

CASES = [
    # size, rate, groups, shape
    (16, 0.5, 1, ()),
    (33, 0.4, 3, ()),
    (12, 0.3, 4, (5,)),
    (7, 0.9, 1, (2, 3)),
    (9, 1.0, 3, (2,)),
    (10, 0.04, 1, ()),  # 9.6: nothing is dropped
]


def test_indices_are_the_twins():
    @jax.jit  # all together, to compile once
    def indices(key):
        return [
            keep_indices(key, rate, size, groups=groups, shape=shape)
            for size, rate, groups, shape in CASES
        ]

    for key in (KEY, jax.random.key_data(KEY), jax.random.key(3, impl="rbg")):
        for ours, case in zip(indices(key), CASES, strict=True):
            assert ours.dtype == jnp.int32
            np.testing.assert_array_equal(ours, twin(*case, key=key))


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: f"{v['size']}-{v['rate']}")
def test_golden_subsets_are_reproduced(vector):
    key = jnp.array([int(word, 16) for word in vector["key_words"]], jnp.uint32)
    indices = keep_indices(
        key,
        vector["rate"],
        vector["size"],
        groups=vector["groups"],
        shape=vector["shape"],
        start=vector["start"],
        global_shape=vector["global_shape"],
    )
    np.testing.assert_array_equal(indices, vector["indices"])


def test_x64_changes_nothing():
    with jax.enable_x64(True):
        indices = jax.jit(lambda key: keep_indices(key, 0.4, 33, groups=3))(KEY)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, twin(33, 0.4, 3))


@pytest.mark.parametrize(
    ("size", "rate", "count"),
    [
        (10, 0.5, 5),
        (5, 0.5, 2),  # ties to even
        (7, 0.5, 4),
        (10, 0.95, 1),  # in floating point 10 * (1 - 0.95) is above 0.5, which rounds to 0
        (10, 0.85, 2),  # and 10 * (1 - 0.85) is above 1.5
        (30, 0.45, 16),  # and 30 * (1 - 0.45) is 16.5
        (10, np.float32(0.1), 9),
        (3, 0.01, 3),
        (3, 0, 3),
        (100, 1, 1),
        (1, 0.9, 1),
    ],
)
def test_the_number_of_kept_elements_is_rounded_to_the_nearest_but_at_least_one(size, rate, count):
    shape = jax.eval_shape(lambda key: keep_indices(key, rate, 2 * size, groups=2), KEY).shape
    assert shape == (2 * count,)
    assert law_twin.kept_count(size, float(rate)) == count


def test_all_counts_are_the_twins():
    for size, hundredths in itertools.product([3, 20, 32, 197, 1000], range(0, 101, 5)):
        rate = hundredths / 100
        subset = _indices.Subset("test", KEY, rate, (size,))
        assert subset.count == law_twin.kept_count(size, rate)


def test_a_part_equals_the_part_of_the_whole():
    """Groups and rows of a larger array, at static and traced starts."""
    whole = twin(24, 0.5, 6, (4,)).reshape(4, 6, 2)

    def part(start):
        return keep_indices(KEY, 0.5, 8, groups=2, shape=(2,), start=start, global_shape=(4, 24))

    traced = jax.jit(lambda *start: part(start))
    for row, group in ((0, 0), (1, 2), (2, 4)):
        expected = whole[row : row + 2, group : group + 2].reshape(2, 4) - 4 * group
        np.testing.assert_array_equal(traced(row, 4 * group), expected)
    np.testing.assert_array_equal(part((2, 16)), expected)


def test_equal_numbers_are_taken_by_position():
    uniform = jnp.array([[3, 1, 1, 2, 1, 0]], jnp.uint32)
    np.testing.assert_array_equal(_indices.kept_first(uniform, 3)[:, :3], [[1, 2, 5]])
    order = _indices.kept_first(uniform, 3, ordered=False)
    np.testing.assert_array_equal(order, [[5, 1, 2, 4, 3, 0]])


def test_subsets_of_one_key_are_nested_in_the_rate():
    few, many = (set(twin(40, rate).tolist()) for rate in (0.7, 0.2))
    assert few < many


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_vmap_over_keys_equals_the_loop(impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 4)
    batched = jax.jit(jax.vmap(lambda key: keep_indices(key, 0.4, 12, groups=2)))
    for raw in (keys, jax.random.key_data(keys)):
        np.testing.assert_array_equal(batched(raw), [twin(12, 0.4, 2, key=key) for key in keys])


def test_a_key_that_two_subsets_have_is_reported():
    """And a gradient, which has it in two passes, is not."""
    x = normal(4, 3)

    def drop(key, x):
        return stochastic_depth(key, jnp.sin, x, 0.5)

    with jax.debug_key_reuse(True):
        jax.jit(jax.grad(lambda x, key: drop(key, x).sum()))(x, KEY)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key, x: drop(key, drop(key, x)))(jax.random.key(1), x)


def test_nothing_is_chosen_of_nothing():
    assert keep_indices(KEY, 0.5, 4, shape=(0, 3)).shape == (0, 3, 2)
    empty = jnp.zeros((0, 3, 2))
    assert stochastic_depth(KEY, jnp.sin, empty, 0.5).shape == empty.shape
    assert route_tokens(KEY, lambda x, _: x, empty, 0.5).shape == empty.shape
    x = jnp.ones(3)
    assert layer_subset(KEY, lambda p, x: p * x, jnp.zeros((0, 3)), x, 0.5).shape == x.shape


# --- statistics ---------------------------------------------------------------------------


def test_all_subsets_are_equally_probable():
    """n = 2^15, 3 of 5 and then 2 of 3 twice; chi-squared; the control has numbers of four bits."""
    sizes = [(5, 0.4, 1), (6, 1 / 3, 2)]
    choices = [
        list(itertools.combinations(range(5), 3)),
        [
            (*a, *b)
            for a in itertools.combinations(range(3), 2)
            for b in itertools.combinations(range(3, 6), 2)
        ],
    ]
    draw = jax.jit(
        lambda key: [
            keep_indices(key, rate, size, groups=groups, shape=(1 << 15,))
            for size, rate, groups in sizes
        ]
    )

    def p_value(indices, choices):
        counts = [(indices == np.array(choice)).all(axis=-1).sum() for choice in choices]
        assert sum(counts) == len(indices)
        return stats.chisquare(counts).pvalue

    for indices, possible in zip(draw(jax.random.key(6)), choices, strict=True):
        assert p_value(np.asarray(indices), possible) > FALSE_ALARM
    coarse = np.random.default_rng(0).integers(0, 16, (1 << 15, 5)).astype(np.uint32)
    control = np.sort(np.argsort(coarse, axis=-1, kind="stable")[:, :3], axis=-1)
    assert p_value(control, choices[0]) < FALSE_ALARM


def test_means_and_covariances_are_those_of_the_text():
    """n = 2^16 subsets of 5 of 8; false alarm 1e-6; the control is an independent mask."""
    count, n, k = 1 << 16, 8, 5
    p = k / n
    indices = jax.jit(lambda key: keep_indices(key, 1 - p, n, shape=(count,)))(jax.random.key(8))
    kept = np.zeros((count, n))
    np.put_along_axis(kept, np.asarray(indices), 1, axis=-1)
    bound = stats.norm.isf(FALSE_ALARM / (2 * n * n))

    def deviations(kept):
        """z-scores of the means, and of the products of two different elements."""
        of_mean = (kept.mean(0) - p) / math.sqrt(p * (1 - p) / count)
        together = p * (k - 1) / (n - 1)
        assert math.isclose(together - p**2, -p * (1 - p) / (n - 1))
        pairs = (kept.T @ kept)[np.triu_indices(n, 1)] / count
        return of_mean, (pairs - together) / math.sqrt(together * (1 - together) / count)

    for scores in deviations(kept):
        assert np.abs(scores).max() < bound
    independent = np.asarray(jdropout.keep_mask(jax.random.key(9), 1 - p, (count, n)), float)
    of_mean, of_pairs = deviations(independent)
    assert np.abs(of_mean).max() < bound < np.abs(of_pairs).max()


# --- what a function is compared with -----------------------------------------------------


def passes(function, *arrays):
    """The result, a tangent, and the gradients, also of `jax.checkpoint`."""
    y, tangent = jax.jvp(function, arrays, arrays)
    _, pullback = jax.vjp(jax.checkpoint(function), *arrays)
    return dict(y=y, tangent=tangent, gradients=pullback(jax.tree.map(jnp.cos, y)))


def assert_close(ours, expected, rtol=2e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def assert_passes_are(function, plain, *arrays):
    """Compares a function of (key, *arrays) with one of the arrays alone, for KEY."""
    ours, expected = jax.jit(
        lambda key, *arrays: (
            passes(functools.partial(function, key), *arrays),
            passes(plain, *arrays),
        )
    )(KEY, *arrays)
    assert_close(ours, expected)


# --- stochastic_depth ---------------------------------------------------------------------


def test_stochastic_depth_runs_the_branch_on_the_twins_examples_in_both_passes():
    """With trees, groups, another axis, and arguments that belong to examples or to none."""
    x = {"a": normal(3, 12), "b": (normal(2, 12, 4, seed=1),)}
    args = (normal(1, 12, seed=2), None, {"c": normal(3, 1, seed=3)})
    w = normal(4, 4, seed=4)
    kept = twin(12, 0.4, 3)
    assert len(kept) == 6  # 2.4 of 4

    def branch(w, x, scale, nothing, shared):
        assert nothing is None
        assert (scale.shape, shared["c"].shape) == ((1, 6), (3, 1))
        a = jnp.sin(x["a"]) * scale * shared["c"]
        return {"a": a, "b": (jnp.tanh(x["b"][0] @ w) * scale[..., None],)}

    def ours(key, x, args, w):
        return stochastic_depth(
            key, functools.partial(branch, w), x, 0.4, args=args, groups=3, batch_axis=1
        )

    def plain(x, args, w):
        part = jax.tree.map(lambda leaf: leaf[:, kept], x)
        y = branch(w, part, args[0][:, kept], *args[1:])
        return jax.tree.map(lambda x, y: x.at[:, kept].add(2 * y), x, y)

    assert_passes_are(ours, plain, x, args, w)


@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.float8_e4m3fn, jnp.float64],
)
def test_stochastic_depth_is_the_masked_branch_to_the_last_bit(dtype):
    """In an eager call, since XLA's fusions round the masked branch less often."""
    with jax.enable_x64(dtype == jnp.float64):
        x, y_bar = (normal(12, 5, seed=seed).astype(dtype) for seed in (0, 1))
        mask = np.zeros((12, 1), bool)
        mask[twin(12, 0.3)] = True
        wide = dtype if dtype in (jnp.complex64, jnp.float64) else jnp.float32

        def masked(x):
            y = ((x / 2).astype(wide) * (12 / 8)).astype(dtype)
            return x + jnp.where(mask, y, jnp.zeros_like(y))

        def ours(x):
            return stochastic_depth(KEY, lambda x: x / 2, x, 0.3)

        (y, pullback), (expected, plain) = jax.vjp(ours, x), jax.vjp(masked, x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(*pullback(y_bar), *plain(y_bar))


def test_the_mean_over_all_subsets_is_what_evaluation_computes():
    """One key for each of the 6 subsets of 2 in 4, which the test above finds equally probable."""
    keys = jax.random.split(jax.random.key(1), 64)
    indices = np.asarray(jax.vmap(lambda key: keep_indices(key, 0.5, 4))(keys))
    subsets, first = np.unique(indices, axis=0, return_index=True)
    assert len(subsets) == 6
    x = normal(4, 3)
    drop = jax.vmap(lambda key, x: stochastic_depth(key, jnp.sin, x, 0.5), in_axes=(0, None))
    y = jax.jit(drop)(keys[first], x)
    np.testing.assert_allclose(y.mean(0), x + np.sin(x), rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_vmap_over_keys():
    x, keys = normal(6, 3), jax.random.split(KEY, 3)

    def penalty(drop, x):
        """Which has the gradient inside."""
        gradient = jax.grad(lambda x: jnp.sum(drop(x) ** 3))
        return jnp.sum(gradient(x) ** 2)

    @jax.jit
    def ours(keys, x):
        def of_one(key):
            drop = functools.partial(stochastic_depth, key, jnp.sin, rate=0.5)
            return jax.grad(lambda x: penalty(lambda x: drop(x), x))(x)

        return jax.vmap(of_one)(keys)

    for key, result in zip(keys, ours(keys, x), strict=True):
        kept = twin(6, 0.5, key=key)
        plain = functools.partial(
            penalty, lambda x, kept=kept: x.at[kept].add(2 * jnp.sin(x[kept]))
        )
        np.testing.assert_allclose(result, jax.jit(jax.grad(plain))(x), rtol=2e-4, atol=1e-3)


class Branch(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.0, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


def test_an_nnx_module_is_a_branch_with_its_own_parameters_dropout_and_state():
    x, kept = normal(8, 4), twin(8, 0.5)
    model = Branch(nnx.Rngs(0))

    @nnx.jit
    def step(model, key, x):
        def loss(model, x):
            y = stochastic_depth(key, model, x, 0.5)
            return jnp.sum(y**2), y

        return nnx.value_and_grad(loss, has_aux=True)(model, x)

    alone = nnx.clone(model)
    (_, y), gradients = step(model, KEY, x)
    expected = alone(x[kept])
    np.testing.assert_allclose(y, x.at[kept].add(2 * expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.norm.mean[...], alone.norm.mean[...], rtol=1e-5, atol=1e-6)
    assert model.dropout.rngs.count[...] == 1
    assert np.abs(gradients.dense.kernel[...]).max() > 0


class LinenBranch(linen.Module):
    @linen.compact
    def __call__(self, x):
        dense = linen.Dense(16, kernel_init=UNIFORM)
        norm = linen.BatchNorm(use_running_average=False, momentum=0.0)
        return linen.Dropout(0.5, deterministic=False)(norm(dense(x)))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return stochastic_depth(self.make_rng("depth"), LinenBranch(name="branch"), x, 0.5)


def test_a_linen_module_is_a_branch_with_its_own_parameters_dropout_and_state():
    x, keys = normal(8, 16), jax.random.split(KEY, 3)
    rngs = dict(zip(("params", "depth", "dropout"), keys, strict=True))

    @jax.jit
    def both(x):
        block = LinenBlock()
        variables = block.init(rngs, x)
        y, new = block.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
        kept = jnp.nonzero((y != x).any(-1), size=4)[0]  # dropout leaves something of each
        inner = {collection: tree["branch"] for collection, tree in variables.items()}
        _, alone = LinenBranch().apply(inner, x[kept], rngs=rngs, mutable=["batch_stats"])
        return y, new["batch_stats"]["branch"], alone["batch_stats"]

    y, ours, alone = both(x)
    assert (np.asarray(y) != x).any(-1).sum() == 4
    assert_close(ours, alone)


def test_what_is_not_a_number_in_dropped_rows_has_no_effect():
    kept, weight = twin(8, 0.5), normal(4, 4)
    x, y_bar = np.asarray(normal(8, 4, seed=1)), np.asarray(normal(8, 4, seed=2))
    dropped = np.setdiff1d(np.arange(8), kept)
    bad_x, bad_y_bar = x.copy(), y_bar.copy()
    bad_x[dropped], bad_y_bar[dropped] = np.nan, np.inf

    @jax.jit
    def both(x, y_bar):
        def drop(weight, x):
            return stochastic_depth(KEY, lambda x: jnp.tanh(x @ weight), x, 0.5)

        y, pullback = jax.vjp(drop, weight, x)
        return y, *pullback(y_bar)

    y, weight_bar, x_bar = both(bad_x, bad_y_bar)
    expected = both(x, y_bar)
    np.testing.assert_array_equal(y[kept], expected[0][kept])
    np.testing.assert_array_equal(y[dropped], bad_x[dropped])
    np.testing.assert_array_equal(weight_bar, expected[1])
    np.testing.assert_array_equal(x_bar[kept], expected[2][kept])
    np.testing.assert_array_equal(x_bar[dropped], bad_y_bar[dropped])


# --- layer_subset -------------------------------------------------------------------------

LAYERS = {"w": normal(6, 3, 3), "b": normal(6, 3, seed=1)}


def layer(p, x):
    return jax.tree.map(lambda x: x + jnp.tanh(x @ p["w"] + p["b"][None]), x)


@pytest.mark.parametrize("unbiased", [False, True])
def test_layer_subset_runs_the_twins_layers_in_both_passes(unbiased):
    x = (normal(4, 3, seed=2), normal(5, 3, seed=3))
    kept = twin(6, 0.3, 2)
    assert len(kept) == 4

    def ours(key, params, x):
        return layer_subset(key, layer, params, x, 0.3, groups=2, unbiased=unbiased)

    def plain(params, x):
        for index in kept:
            y = layer(jax.tree.map(lambda p, index=index: p[index], params), x)
            factor = 6 / 4 if unbiased else 1
            x = jax.tree.map(lambda x, y, factor=factor: x + (y - x) * factor, x, y)
        return x

    assert_passes_are(ours, plain, LAYERS, x)


def test_skipped_layers_have_no_gradient_and_may_hold_anything():
    kept = twin(6, 0.5)
    skipped = np.setdiff1d(np.arange(6), kept)
    params = jax.tree.map(lambda p: p.at[skipped].set(jnp.nan), LAYERS)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda params: layer_subset(KEY, layer, params, x, 0.5).sum())(params)

    for leaf in jax.tree.leaves(gradient(params, normal(4, 3, seed=2))):
        np.testing.assert_array_equal(leaf[skipped], 0)
        assert np.abs(leaf[kept]).min() > 0


def test_keys_and_integers_are_parameters_of_layers():
    """A layer's own dropout has the key of the layer, whichever of them run."""
    keys, kept = jax.random.split(jax.random.key(4), 6), twin(6, 0.5)
    x = jnp.ones((4, 3))

    def noisy(p, x):
        key, number = p
        return x + jdropout.dropout(key, x, 0.5) * number.astype(x.dtype)

    @jax.jit
    def both(x):
        y = layer_subset(KEY, noisy, (keys, jnp.arange(6)), x, 0.5)
        for index in kept:
            x = noisy((keys[index], jnp.asarray(index)), x)
        return y, x

    np.testing.assert_allclose(*both(x), rtol=1e-6)


# --- route_tokens -------------------------------------------------------------------------


def attention(x, positions):
    """Causal by position, with scores that depend on the distance."""
    scores = jnp.einsum("btd,bsd->bts", x, x) - 0.1 * jnp.abs(
        positions[:, :, None] - positions[:, None, :]
    ).astype(x.dtype)
    causal = positions[:, :, None] >= positions[:, None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return x + jnp.einsum("bts,bsd->btd", weights, x)


def test_route_tokens_is_attention_among_the_kept_tokens_in_both_passes():
    x, prefix = normal(3, 9, 4), 2
    tokens = np.concatenate([np.tile([0, 1], (3, 1)), twin(7, 0.4, shape=(3,)) + 2], axis=1)

    def ours(key, x):
        return route_tokens(key, attention, x, 0.4, num_prefix_tokens=prefix)

    def plain(x):
        rows = np.arange(3)[:, None]
        return x.at[rows, tokens].set(attention(x[rows, tokens], jnp.asarray(tokens)))

    assert_passes_are(ours, plain, x)


def test_a_causal_mask_of_the_usual_form_is_right_among_the_kept_tokens():
    """Since they are in order, it equals one by position."""
    x = normal(2, 8, 4)

    def attend(x, causal):
        scores = jnp.where(causal, jnp.einsum("btd,bsd->bts", x, x), -jnp.inf)
        return x + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), x)

    def usual(x, _):
        return attend(x, jnp.tril(jnp.ones((1, *[x.shape[1]] * 2), bool)))

    def by_position(x, positions):
        return attend(x, positions[:, :, None] >= positions[:, None, :])

    @jax.jit
    def both(x):
        return [route_tokens(KEY, layers, x, 0.5) for layers in (usual, by_position)]

    np.testing.assert_array_equal(*both(x))


def test_what_belongs_to_the_tokens_goes_with_them():
    """A tree with an axis of its own, and one that all examples share; two batch axes."""
    x = normal(2, 3, 6, 4)
    positions = {"angle": normal(2, 3, 6, 4, seed=1), "segment": jnp.arange(6).reshape(1, 1, 6)}
    kept = twin(6, 0.5, shape=(2, 3))

    def layers(x, p):
        assert p["segment"].shape == x.shape[:3]
        return x * p["angle"] + p["segment"][..., None].astype(x.dtype)

    def ours(key, x, angle):
        return route_tokens(key, layers, x, 0.5, axis=2, positions=positions | {"angle": angle})

    def plain(x, angle):
        at = (np.arange(2)[:, None, None], np.arange(3)[:, None], kept)
        part = {"angle": angle[at], "segment": jnp.asarray(kept)}
        return x.at[at].set(layers(x[at], part))

    assert_passes_are(ours, plain, x, positions["angle"])


def test_tokens_of_every_dtype_go_to_the_places_of_the_kept():
    """Integers take another way than what has gradients. The layer reverses the tokens it gets."""
    dtypes = [jnp.int32, jnp.bool_, jnp.bfloat16, jnp.float8_e5m2, jnp.complex64, jnp.uint8]
    kept, tokens = twin(10, 0.5, shape=(2,)), np.arange(20).reshape(2, 10)
    xs = [jnp.asarray(tokens % 3 if dtype == jnp.bool_ else tokens, dtype) for dtype in dtypes]
    routed = jax.jit(lambda xs: [route_tokens(KEY, lambda x, _: x[:, ::-1], x, 0.5) for x in xs])
    for x, y in zip(xs, routed(xs), strict=True):
        expected = np.array(x)
        np.put_along_axis(expected, kept, np.take_along_axis(expected, kept[:, ::-1], 1), 1)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, expected)


# --- unit_subset --------------------------------------------------------------------------


def mlp(w, v, x):
    """With a gate; a plain one has fewer arrays in its trees."""
    hidden = jax.nn.silu(x @ w["gate"]) * (x @ w["up"] + w["bias"][None])
    return hidden @ v["down"]


def small(*shape, seed):
    """Numbers whose products do not grow."""
    return normal(*shape, seed=seed) / 3


MLP = (
    {"gate": small(4, 12, seed=0), "up": small(4, 12, seed=1), "bias": small(12, seed=2)},
    {"down": small(12, 5, seed=3)},
    normal(6, 4, seed=4),
)


@pytest.mark.parametrize("tiles", [1, 3])
def test_unit_subset_drops_the_twins_hidden_units_in_both_passes(tiles):
    mask = np.zeros((tiles, 12), np.float32)
    np.put_along_axis(mask, twin(12, 0.5, 2, (tiles,)), 2, axis=1)

    def ours(key, w, v, x):
        return unit_subset(key, mlp, w, v, x, 0.5, groups=2, tiles=tiles)

    def plain(w, v, x):
        parts = [
            mlp(w, {"down": v["down"] * mask[i][:, None]}, part)
            for i, part in enumerate(jnp.split(x, tiles))
        ]
        return jnp.concatenate(parts)

    assert_passes_are(ours, plain, *MLP)


def heads(w, v, x):
    """Attention of the usual layout: kernels of (features, heads, head features)."""
    q, k, y = (jnp.einsum("btd,dhf->bthf", x, w[n]["kernel"]) + w[n]["bias"] for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthf,bshf->bhts", q, k))
    return jnp.einsum("bhts,bshf,hfd->btd", weights, y, v)


def test_unit_subset_drops_heads_of_attention_in_both_passes():
    def projection(seed):
        return {"kernel": small(6, 4, 3, seed=seed), "bias": small(1, 1, 4, 3, seed=seed + 1)}

    w = {name: projection(2 * i) for i, name in enumerate("qkv")}
    v, x = small(4, 3, 6, seed=7), normal(2, 5, 6, seed=8)
    mask = np.zeros((4, 1, 1), np.float32)
    mask[twin(4, 0.5, shape=(1,))[0]] = 2

    def ours(key, w, v, x):
        return unit_subset(key, heads, w, v, x, 0.5, incoming_axis=-2)

    assert_passes_are(ours, lambda w, v, x: heads(w, v * mask, x), w, v, x)


def test_tiles_of_another_axis_and_of_trees():
    w, v, x = normal(4, 6), normal(6, 4, seed=1), normal(3, 4, 4, seed=2)

    def block(w, v, x):
        return {"y": (jnp.tanh(x["x"] @ w) @ v,)}

    @jax.jit
    def drop(x):
        return unit_subset(KEY, block, w, v, {"x": x}, 0.5, tiles=2, batch_axis=1)

    kept = twin(6, 0.5, shape=(2,))
    parts = [np.tanh(x[:, 2 * i : 2 * i + 2] @ w[:, kept[i]]) @ v[kept[i]] * 2 for i in range(2)]
    np.testing.assert_allclose(drop(x)["y"][0], np.concatenate(parts, 1), rtol=1e-4, atol=1e-5)


def test_parts_of_units_and_tiles_add_up_to_the_whole():
    """As in shard_map: half of the units and one of two tiles on each of four devices."""
    w, v, x = normal(4, 8), normal(8, 4, seed=1), normal(6, 4, seed=2)

    def block(w, v, x):
        return jnp.tanh(x @ w) @ v

    def part(i, j):
        units = slice(4 * j, 4 * j + 4)
        return unit_subset(
            KEY,
            block,
            w[:, units],
            v[units],
            x[3 * i : 3 * i + 3],
            0.5,
            start=(i, 4 * j),
            global_shape=(2, 8),
        )

    @jax.jit
    def both():
        whole = unit_subset(KEY, block, w, v, x, 0.5, groups=2, tiles=2)
        return whole, jnp.concatenate([part(i, 0) + part(i, 1) for i in range(2)])

    np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float64, jnp.complex64]
)
def test_dtypes_are_kept(dtype):
    """Of results and gradients; promotion is strict, so nothing is widened on the way."""

    def all_of_them(x, p, w, v):
        x = stochastic_depth(KEY, lambda x: x, x, 0.5)
        x = route_tokens(KEY, lambda x, _: x * x, x, 0.5)
        x = layer_subset(KEY, lambda p, x: x + p * x, p, x, 0.5, unbiased=True)
        return unit_subset(KEY, lambda w, v, x: x @ w @ v, w, v, x, 0.5)

    def passes(*arrays):
        y, pullback = jax.vjp(all_of_them, *arrays)
        return y, *pullback(y)

    with jax.enable_x64(True):
        arrays = [array.astype(dtype) for array in (X, PARAMS, *KERNELS)]
        results = jax.eval_shape(passes, *arrays)
    assert {y.dtype for y in results} == {jnp.dtype(dtype)}


# --- nothing dropped, and almost everything -----------------------------------------------

CALLS = {
    "stochastic_depth": lambda key, rate, **options: stochastic_depth(
        key, jnp.sin, X, rate, **options
    ),
    "route_tokens": lambda key, rate, **options: route_tokens(
        key, lambda x, _: x + jnp.sin(x), X, rate, **options
    ),
    "layer_subset": lambda key, rate, **options: layer_subset(
        key, lambda p, x: x + jnp.sin(p * x), PARAMS, X, rate, **options
    ),
    "unit_subset": lambda key, rate, **options: unit_subset(
        key, lambda w, v, x: jnp.tanh(x @ w) @ v, *KERNELS, X, rate, **options
    ),
}


def everything(name):
    x = np.asarray(X)
    if name == "layer_subset":
        for p in np.asarray(PARAMS):
            x = x + np.sin(p * x)
        return x
    w, v = (np.asarray(kernel) for kernel in KERNELS)
    return np.tanh(x @ w) @ v if name == "unit_subset" else x + np.sin(x)


@pytest.mark.parametrize("name", CALLS)
def test_without_dropping_no_key_is_needed_and_all_is_computed(name):
    call, expected = CALLS[name], everything(name)
    results = jax.jit(
        lambda: [call(None, 0), call(None, 0.01), call(None, 0.5, deterministic=True)]
    )()
    for y in results:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_takes_a_batch_that_groups_do_not_divide():
    """The last one may be smaller."""
    y = stochastic_depth(None, jnp.sin, X, 0.5, groups=3, deterministic=True)
    np.testing.assert_allclose(y, everything("stochastic_depth"), rtol=1e-5, atol=1e-6)


def test_at_rate_one_one_element_stays():
    @jax.jit
    def shapes_and_results(key):
        shapes = []

        def seen(x, *_):
            shapes.append(x.shape)
            return x

        results = [
            stochastic_depth(key, seen, X, 1.0, groups=2),
            route_tokens(key, seen, X, 1.0, num_prefix_tokens=1),
            unit_subset(key, lambda w, v, x: seen(w) @ v, *KERNELS, X, 1.0),
        ]
        assert shapes == [(2, 6, 3), (4, 2, 3), (3, 1)]
        return results

    added = np.asarray(shapes_and_results(KEY)[0] - X)
    kept = twin(4, 1.0, 2)
    np.testing.assert_allclose(added[kept], 2 * X[kept], rtol=1e-6)
    assert not added[np.setdiff1d(np.arange(4), kept)].any()


# --- the audit ----------------------------------------------------------------------------


# A function of a key and an array that is differentiated, and the bytes that it stores of the draw.
STORED = {
    "stochastic_depth": (lambda key, x: stochastic_depth(key, jnp.sin, x, 0.5), X, 8 * 4),
    "route_tokens": (
        lambda key, x: route_tokens(key, lambda x, _: x + jnp.sin(x), x, 0.5),
        X,
        8 * 4 * 6,
    ),
    "layer_subset": (
        lambda key, p: layer_subset(key, lambda p, x: x + jnp.sin(p * x), p, X, 0.5),
        PARAMS,
        8 * 4,
    ),
    "unit_subset": (
        lambda key, w: unit_subset(
            key, lambda w, v, x: jnp.tanh(x @ w) @ v, w, KERNELS[1], X, 0.5, tiles=2
        ),
        KERNELS[0],
        8 * 2 * 8,
    ),
    "keep_indices": (lambda key, x: x[keep_indices(key, 0.5, 4)], X, 4 * 2),
}


def test_an_audit_reports_the_bytes_of_the_integers_among_the_residuals():
    residuals = jax.eval_shape(
        lambda: {
            name: jax.tree.leaves(jax.vjp(jax.jit(functools.partial(f, KEY)), x)[1])
            for name, (f, x, _) in STORED.items()
        }
    )
    for name, (function, x, expected) in STORED.items():
        (site,) = jdropout.audit(function, KEY, x).sites
        assert site.kind == name
        assert site.rate == site.effective_rate == site.saved_work == 0.5
        integers = [a for a in residuals[name] if not jnp.issubdtype(a.dtype, jnp.inexact)]
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in integers) == expected
        assert site.stored_bytes == expected


def test_an_audit_of_a_training_step_is_clean_and_says_what_it_saves():
    def train_step(w, v, x, root, step):
        def loss(w, v):
            key = jdropout.keys.at_site(jax.random.fold_in(root, step), "blocks")

            def block(x, key):
                depth, units, tokens = (jdropout.keys.at_site(key, i) for i in range(3))

                def branch(x):
                    return unit_subset(units, lambda w, v, x: jnp.tanh(x @ w) @ v, w, v, x, 0.25)

                x = stochastic_depth(depth, branch, x, 0.3)
                return route_tokens(tokens, lambda x, _: x * 2, x, 1 / 3), None

            keys = jax.vmap(lambda i: jdropout.keys.at_site(key, i))(jnp.arange(2))
            x_end, _ = lax.scan(block, x, keys)
            return x_end.sum()

        return jax.grad(loss, (0, 1))(w, v)

    report = jdropout.audit(jax.jit(train_step), *KERNELS, X, KEY, 0)
    report.assert_clean()
    assert [site.kind for site in report.sites] == [
        "stochastic_depth",
        "unit_subset",
        "route_tokens",
    ]
    assert [site.rate for site in report.sites] == [0.3, 0.25, 1 / 3]
    assert [site.effective_rate for site in report.sites] == [0.25, 0.25, 1 - 4 / 6]
    assert [site.saved_work for site in report.sites] == [0.25, 0.25, 1 - 4 / 6]
    lines = str(report).splitlines()
    column = lines[2].index("saves")
    assert [line[column : column + 3] for line in lines[4:7]] == ["25%", "25%", "33%"]


# --- costs --------------------------------------------------------------------------------


def scatters(function, *arrays):
    """The number in a gradient that JAX gives to XLA, which on a CPU turns them into loops."""
    gradient = jax.grad(lambda *arrays: function(*arrays).sum(), tuple(range(len(arrays))))
    return jax.jit(gradient).lower(*arrays).as_text().count("stablehlo.scatter")


def test_no_pass_scatters():
    x, (w, v) = normal(4, 6, 8), (normal(8, 16), normal(16, 8))

    def all_of_them(x, w, v):
        branch = functools.partial(block, w, v)
        x = stochastic_depth(KEY, branch, x, 0.5, groups=2)
        x = route_tokens(KEY, lambda x, _: x + branch(x), x, 0.5, num_prefix_tokens=1)
        x = x + unit_subset(KEY, block, w, v, x, 0.5, groups=2)
        x = x + unit_subset(KEY, block, w, v, x, 0.5, tiles=2)
        x = layer_subset(KEY, lambda w, x: x + jnp.tanh(x @ w), jnp.stack([w @ v] * 4), x, 0.5)
        return jdropout.patch_dropout(KEY, x, 0.5)[0]

    def block(w, v, x):
        return jnp.tanh(x @ w) @ v

    assert scatters(all_of_them, x, w, v) == 0

    def control(x):
        return x[:, keep_indices(KEY, 0.5, 6)]

    assert scatters(control, x) > 0


@pytest.mark.parametrize("name", ["stochastic_depth", "route_tokens", "unit_subset"])
def test_operations_are_those_of_what_is_kept(name):
    """Matrix products take nearly all of them; 12 of 20 are kept."""
    x, w, v = normal(20, 20, 32), normal(32, 40), normal(40, 32)

    def loss(rate, x, w, v):
        def block(w, v, x):
            return jnp.maximum(x @ w, 0) @ v

        if name == "stochastic_depth":
            y = stochastic_depth(KEY, functools.partial(block, w, v), x, rate)
        elif name == "route_tokens":
            y = route_tokens(KEY, lambda x, _: x + block(w, v, x), x, rate)
        else:
            y = unit_subset(KEY, block, w, v, x, rate)
        return y.sum()

    def operations(rate):
        gradient = jax.jit(jax.grad(functools.partial(loss, rate), (0, 1, 2)))
        return gradient.lower(x, w, v).compile().cost_analysis()["flops"]

    assert 0.55 < operations(0.4) / operations(0.0) < 0.66


# --- errors -------------------------------------------------------------------------------


def block(w, v, x):
    return x @ w @ v


def indices(key=KEY, rate=0.5, size=8, **options):
    return keep_indices(key, rate, size, **options)


def depth(key=KEY, branch=jnp.sin, x=X, rate=0.5, **options):
    return stochastic_depth(key, branch, x, rate, **options)


def route(key=KEY, layers=lambda x, _: x, x=X, rate=0.5, **options):
    return route_tokens(key, layers, x, rate, **options)


def layers(key=KEY, layer=lambda p, x: x + p, stacked=PARAMS, x=X, rate=0.5, **options):
    return layer_subset(key, layer, stacked, x, rate, **options)


def units(key=KEY, block=block, w=KERNELS[0], v=KERNELS[1], x=X, rate=0.5, **options):
    return unit_subset(key, block, w, v, x, rate, **options)


FEW = jnp.ones((3, 5))
ERRORS = [
    (indices, dict(size=0), ValueError, "size must be at least 1, got 0"),
    (indices, dict(size=8.0), TypeError, "size must be an integer, got 8.0"),
    (indices, dict(shape=3), TypeError, "shape must be a sequence of integers, got 3"),
    (
        indices,
        dict(groups=3),
        ValueError,
        "groups must divide the 8 elements to choose from, got 3",
    ),
    (indices, dict(groups=0), ValueError, "groups must be at least 1, got 0"),
    (indices, dict(groups=True), TypeError, "groups must be an integer, got True"),
    (indices, dict(rate=2), ValueError, "rate must be in [0, 1], got 2"),
    (indices, dict(key=None), ValueError, "key is None"),
    (indices, dict(key=jax.random.split(KEY, 2)), ValueError, "must be a single key"),
    (indices, dict(start=(8,)), ValueError, "start was given without global_shape"),
    (indices, dict(start=8, global_shape=(16,)), TypeError, "start must be a sequence"),
    (
        indices,
        dict(start=(4,), global_shape=(16,)),
        ValueError,
        "start must be the beginning of a group of 8 elements on its last axis, got 4. Split",
    ),
    (indices, dict(start=(16,), global_shape=(16,)), ValueError, "global_shape"),
    (depth, dict(branch=X), TypeError, "branch must be a function, got ArrayImpl"),
    (depth, dict(x=[1.0]), ValueError, "x must have batch_axis 0, got a scalar"),
    (depth, dict(x={}), ValueError, "x must hold an array, got {}"),
    (depth, dict(x=(X, FEW)), ValueError, "x must have one size on batch_axis 0, got [4, 3]"),
    (depth, dict(x="x"), TypeError, "x must be an array, got str"),
    (depth, dict(batch_axis=3), ValueError, "batch_axis is 3, but the array has 3 axes"),
    (depth, dict(groups=3), ValueError, "groups must divide the 4 elements"),
    (depth, dict(args=X), TypeError, "args must be a tuple of arguments, got ArrayImpl. Write"),
    (depth, dict(args=(FEW,)), ValueError, "args must have the 4 examples of x on axis 0"),
    (depth, dict(args=(FEW,), deterministic=True), ValueError, "got shape (3, 5). Pass what all"),
    (depth, dict(args=(1.0,)), ValueError, "or a single one, got shape (). Pass what all"),
    (depth, dict(args=(FEW, "a")), TypeError, "args must be an array, got str"),
    (
        depth,
        dict(branch=lambda x: x[:, :1]),
        ValueError,
        "branch must return arrays of the shapes of its input, [(2, 6, 3)], got [(2, 1, 3)]. It",
    ),
    (depth, dict(branch=lambda x: (x,)), ValueError, "leave the residual connection out of it"),
    (depth, dict(branch=lambda x: (x,), rate=0), ValueError, "leave the residual connection out"),
    (
        depth,
        dict(branch=lambda x: x.astype(jnp.int32)),
        TypeError,
        "branch's result must be floating-point or complex, since it is multiplied, got dtype",
    ),
    (depth, dict(deterministic=1), TypeError, "deterministic must be True, False"),
    (route, dict(layers=3), TypeError, "layers must be a function, got int"),
    (route, dict(x=[X]), TypeError, "x must be an array, got list"),
    (route, dict(axis=3), ValueError, "axis is 3, but the array has 3 axes"),
    (route, dict(num_prefix_tokens=6), ValueError, "below the 6 tokens, got 6"),
    (route, dict(num_prefix_tokens=1.0), TypeError, "num_prefix_tokens must be an integer"),
    (
        route,
        dict(positions=jnp.arange(6)),
        ValueError,
        "positions must have the leading axes (4, 6) of x's examples and tokens, got shape (6,)",
    ),
    (route, dict(positions=jnp.ones((2, 6))), ValueError, "got shape (2, 6). Insert axes"),
    (route, dict(positions=jnp.ones((4, 1))), ValueError, "got shape (4, 1). Insert axes"),
    (
        route,
        dict(layers=lambda x, _: x[..., :1]),
        ValueError,
        "layers must return the shape and dtype of the tokens they get, float32[4, 3, 3], got "
        "float32[4, 3, 1]",
    ),
    (route, dict(layers=lambda x, _: x.astype(jnp.bfloat16)), ValueError, "convert with .astype"),
    (route, dict(layers=lambda x, _: None, rate=0), ValueError, "got NoneType"),
    (layers, dict(layer=3), TypeError, "layer must be a function, got int"),
    (layers, dict(stacked=1.0), ValueError, "stacked_params must have axis 0, got a scalar"),
    (
        layers,
        dict(stacked=(PARAMS, FEW)),
        ValueError,
        "stacked_params must have one size on axis 0",
    ),
    (layers, dict(stacked=()), ValueError, "stacked_params must hold an array"),
    (layers, dict(groups=3), ValueError, "groups must divide the 4 elements"),
    (layers, dict(unbiased=1), TypeError, "unbiased must be True or False, got 1"),
    (
        layers,
        dict(layer=lambda p, x: x[0]),
        ValueError,
        "layer must return the shape and dtype of its input, float32[4, 6, 3], got float32[6, 3]",
    ),
    (units, dict(block=3), TypeError, "block must be a function, got int"),
    (
        units,
        dict(v=jnp.ones((5, 3))),
        ValueError,
        "outgoing must have the 8 units of incoming on outgoing_axis 0, got 5. Check",
    ),
    (
        units,  # grouped queries: fewer heads of keys than of queries
        dict(w=[jnp.ones((3, 8, 2)), jnp.ones((3, 4, 2))], incoming_axis=-2),
        ValueError,
        "incoming must have one size on incoming_axis -2, got [8, 4]. Pass arrays without",
    ),
    (units, dict(incoming_axis=2), ValueError, "incoming_axis is 2, but the array has 2 axes"),
    (units, dict(outgoing_axis=2.0), TypeError, "outgoing_axis must be an integer, got 2.0"),
    (units, dict(w={}), ValueError, "incoming must hold an array, got {}"),
    (units, dict(v="v"), TypeError, "outgoing must be an array, got str"),
    (
        units,
        dict(v=jnp.ones((8, 3), jnp.int8)),
        TypeError,
        "outgoing must be floating-point or complex, since it is multiplied, got dtype int8",
    ),
    (units, dict(tiles=3), ValueError, "tiles must divide the 4 examples of x, got 3"),
    (units, dict(tiles=0), ValueError, "tiles must be at least 1, got 0"),
    (units, dict(groups=3), ValueError, "groups must divide the 8 elements"),
    (
        units,
        dict(start=(0, 2), global_shape=(1, 16)),
        ValueError,
        "start must be the beginning of a group of 8 elements on its last axis, got 2",
    ),
]


@pytest.mark.parametrize(
    ("function", "changes", "error", "text"),
    ERRORS,
    ids=[f"{case[0].__name__}: {case[3]}" for case in ERRORS],
)
def test_errors_name_the_argument_the_value_and_the_fix(function, changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        function(**changes)


@pytest.mark.parametrize("function", [indices, depth, route, layers, units])
def test_a_traced_rate_or_flag_says_that_shapes_depend_on_it(function):
    with pytest.raises(TypeError, match=r"rate must be a number here, since the shape.*static"):
        jax.eval_shape(lambda rate: function(rate=rate), 0.5)
    if function is indices:
        return
    with pytest.raises(TypeError, match=r"deterministic must be True or False here.*static"):
        jax.eval_shape(lambda flag: function(deterministic=flag), True)
