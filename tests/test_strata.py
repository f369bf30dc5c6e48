"""Coupled masks: their law, their statistics, their keys, and Monte Carlo prediction with them."""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx
from scipy import stats

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout import _monte_carlo, _strata, mc_predict
from jdropout.keys import at_site, in_batch, stratified_key

KEY = jax.random.key(20140614)
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_strata.json").read_text())
CRITICAL = 6.0
"""Standard errors that a perfect generator exceeds in one of a billion tests."""


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


# --- the law ------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: v["checks"])
def test_golden_masks_are_reproduced(vector):
    key = jnp.array([int(word, 16) for word in vector["key_words"]], jnp.uint32)
    place = {name: vector[name] for name in ("start", "global_shape", "precision")}
    key = stratified_key(key, vector["sample"], vector["size"])
    mask = jdropout.keep_mask(key, vector["rate"], vector["shape"], **place)
    assert np.packbits(np.asarray(mask).reshape(-1)).tobytes().hex() == vector["mask"]


def test_one_sample_has_the_masks_of_its_key():
    assert_same(
        jdropout.keep_mask(stratified_key(KEY, 0, 1), 0.3, (9, 5)),
        jdropout.keep_mask(KEY, 0.3, (9, 5)),
    )


def test_every_order_of_every_size_is_the_rank_among_the_multiples_of_its_factor():
    """In fixed-point numbers, as the library computes it, and in integers, as the law says it."""
    for size in range(1, _strata.LARGEST_SIZE + 1):
        prime = size + 1
        while any(prime % factor == 0 for factor in range(2, prime)):
            prime += 1
        numbers = np.arange(0, 2**16, 2**16 // (4 * prime), dtype=np.uint32)[:, None]
        factors = 1 + numbers.astype(int) * (prime - 1) // 2**16
        assert {*factors[:, 0]} == {*range(1, prime)}
        samples = np.arange(size, dtype=np.uint32)[None]
        orders = np.asarray(_strata._order(numbers, samples, size))
        ranks = np.argsort(np.argsort(factors * (samples.astype(int) + 1) % prime, axis=1), axis=1)
        np.testing.assert_array_equal(orders, ranks)
        order = np.arange(size, dtype=np.uint32)
        shifts = (order * np.uint32(_strata._reciprocal(size))) >> np.uint32(16)
        np.testing.assert_array_equal(shifts, 2**16 * order.astype(int) // size)


def pair_factor(orders, kept):
    """The sum of a unit's squared correlations with other samples.

    What depends on two units has 1 + this, over T, of its variance in a single sample.
    """
    size = orders.shape[1]
    apart = (orders[:, :, None] - orders[:, None, :]) / size % 1
    both = np.maximum(0, kept - apart) + np.maximum(0, kept - (1 - apart))
    correlation = ((both - kept**2) / (kept * (1 - kept))).mean(0)
    np.fill_diagonal(correlation, 0)
    return (correlation**2).sum(1).mean()


@pytest.mark.parametrize(("size", "low", "high"), [(10, 0.09, 0.145), (50, 0.02, 0.03)])
def test_pairs_of_samples_are_nearly_those_of_random_orders(size, low, high):
    """Of random permutations the factor is 1 / (T - 1) where a whole number is kept."""
    numbers = np.arange(0, 2**16, 16, dtype=np.uint32)[:, None]
    orders = _strata._order(numbers, np.arange(size, dtype=np.uint32)[None], size).astype(float)
    factors = [pair_factor(orders, kept) for kept in (0.5, 0.75, 0.9)]
    assert low < min(factors)
    assert max(factors) < high
    # Control: multiples modulo the size itself, of the numbers without a common factor.
    coprime = np.array([a for a in range(size) if math.gcd(a, size) == 1])[:, None]
    assert pair_factor(coprime * np.arange(size) % size, 0.5) > 1.3


def test_the_order_has_a_key_of_its_own():
    words = np.array([3, 5], np.uint32)
    keys = {law_twin.port.mask_key(tuple(words.tolist()), digit) for digit in range(3)}
    assert len(keys) == 3


# --- statistics ---------------------------------------------------------------------------

SIZE, RATE = 10, 0.3
SHAPE = (2, 160, 160)


@functools.cache
def masks(size=SIZE, rate=RATE):
    """The masks of two sites in all samples: (site, sample, *SHAPE)."""

    def sample(index):
        key = stratified_key(KEY, index, size)
        return [jdropout.keep_mask(at_site(key, site), rate, SHAPE) for site in range(2)]

    return np.stack(jax.jit(jax.vmap(sample))(np.arange(size))).astype(float)


def z_score(deviations):
    """Of the mean of independent deviations whose expectation is 0, in standard errors."""
    deviations = deviations.reshape(-1)
    return deviations.mean() / (deviations.std() / math.sqrt(deviations.size))


@pytest.mark.parametrize(("size", "rate"), [(10, 0.3), (8, 0.1)])
def test_every_unit_is_dropped_in_its_share_of_the_samples(size, rate):
    counts = masks(size, rate).sum(1)
    share = size * (1 - rate)
    # 16 bits move a boundary between strata by up to 2^-16: a few counts are one off.
    assert np.isin(counts, [math.floor(share + 1e-3), math.ceil(share - 1e-3)]).mean() > 0.999
    assert abs(z_score(counts - size * (1 - jdropout.effective_rate(rate)))) < CRITICAL


def test_every_sample_alone_has_the_distribution_of_the_mask_law():
    kept = 1 - jdropout.effective_rate(RATE)
    for mask in masks().swapaxes(0, 1):
        assert abs(z_score(mask - kept)) < CRITICAL


def test_all_pairs_of_samples_are_coupled_alike():
    """7 of 10 are kept: two samples both keep a unit with probability 7 * 6 / (10 * 9)."""
    for one, other in itertools.combinations(range(SIZE), 2):
        both = masks()[:, one] * masks()[:, other]
        # The order is a rank among multiples of a random factor, which is not quite random.
        assert abs(both.mean() - 7 * 6 / 90) < 0.04
        assert both.mean() < 0.49 - 0.001  # that of independent samples is 0.49


PAIRS = {
    "rows of a block": (np.s_[:, :, 0::4], np.s_[:, :, 1::4]),
    "other rows of a block": (np.s_[:, :, 1::4], np.s_[:, :, 3::4]),
    "rows of neighbouring blocks": (np.s_[:, :, 0:-4:4], np.s_[:, :, 4::4]),
    "columns": (np.s_[..., 0::2], np.s_[..., 1::2]),
    "leading indices": (np.s_[:, 0], np.s_[:, 1]),
}


@pytest.mark.parametrize("name", [*PAIRS, "sites"])
@pytest.mark.parametrize("apart", [0, 1, 5])
def test_units_are_independent_of_each_other_in_any_two_samples(name, apart):
    """Also together: of both units, in both samples, the orders are independent."""
    deviations = masks() - (1 - jdropout.effective_rate(RATE))
    if name == "sites":
        one, other = deviations
    else:
        one, other = (deviations[0][where] for where in PAIRS[name])
    pairs = [(t, (t + apart) % SIZE) for t in range(SIZE)]
    for t, later in pairs:
        assert abs(z_score(one[t] * other[later])) < CRITICAL
    if apart:
        products = [one[t] * one[u] for t, u in pairs]
        others = [other[t] * other[u] for t, u in pairs]
        for a, b in zip(products, others, strict=True):
            assert abs(z_score((a - a.mean()) * (b - b.mean()))) < CRITICAL


def test_control_units_with_one_order_would_fail():
    deviations = masks()[0] - (1 - jdropout.effective_rate(RATE))
    product = deviations[0] * deviations[1]
    assert z_score((product - product.mean()) ** 2) > 100
    assert abs(z_score(deviations[0] * deviations[0])) > 100


# --- keys ---------------------------------------------------------------------------------


def drop(key, x):
    return jdropout.dropout(key, x, 0.5)


def test_samples_of_a_vmap_with_a_name_share_their_numbers():
    x = normal(6, 12)

    def all_samples(key, axis_name):
        sample = functools.partial(stratified_key, key, size=10, axis_name=axis_name)
        return jax.vmap(lambda i: drop(sample(i), x), axis_name=axis_name)(jnp.arange(10))

    expected = [drop(stratified_key(KEY, i, 10), x) for i in range(10)]
    programs = {}
    for name in (None, "samples"):
        programs[name] = jax.jit(functools.partial(all_samples, axis_name=name))
        assert_same(programs[name](KEY), expected)
    # 2 keys, 2 words of a block, 2 groups of rows, 12 columns: not for each of the 10 samples.
    blocks = {name: "2x2x2x12xui32" in f.lower(KEY).as_text() for name, f in programs.items()}
    assert blocks == {None: False, "samples": True}
    assert "2x10x2x2x12xui32" in programs[None].lower(KEY).as_text()


def test_children_of_a_key_are_for_the_same_sample():
    def children(key):
        a, b = jax.random.split(key)
        return [
            a,
            jax.random.fold_in(b, 3),
            at_site(key, ("x", 1)),
            nnx.RngStream(key, tag="x")(),
        ]

    for number, child in enumerate(children(stratified_key(KEY, 2, 10))):
        expected = stratified_key(children(KEY)[number], 2, 10)
        assert child.dtype == expected.dtype
        assert_same(jax.random.key_data(child), jax.random.key_data(expected))


def test_a_sample_of_a_part_of_a_batch_is_the_part_of_the_sample():
    x = normal(8, 5)
    whole = drop(stratified_key(KEY, 3, 10), x)
    for key in (
        in_batch(stratified_key(KEY, 3, 10), 2, 8),
        stratified_key(in_batch(KEY, 2, 8), 3, 10),
        at_site(in_batch(stratified_key(KEY, 3, 10), 5, 8), ()[:0] or "x"),
    )[:2]:
        assert_same(drop(key, x[2:6]), whole[2:6])
        child = drop(at_site(key, "x"), x[2:6])
        assert_same(child, drop(at_site(stratified_key(KEY, 3, 10), "x"), x)[2:6])


def test_a_sample_within_a_sample_is_coupled_to_the_inner_ones_alone():
    def inner(outer):
        keys = [stratified_key(stratified_key(KEY, outer, 4), i, 10) for i in range(10)]
        return np.stack([jdropout.keep_mask(key, 0.5, (40, 40)) for key in keys])

    first, second = inner(0), inner(1)
    assert_same(first.sum(0), 5)
    assert_same(second.sum(0), 5)
    assert abs((first == second).mean() - 0.5) < 0.02


def test_a_mask_is_the_same_in_both_passes_and_every_transformation():
    x = normal(6, 12)
    key = stratified_key(KEY, 2, 10)
    y = drop(key, x)

    @jax.jit
    def passes(key, x):
        y, pullback = jax.vjp(jax.checkpoint(lambda x: drop(key, x)), x)
        _, tangent = jax.jvp(lambda x: drop(key, x), (x,), (x,))
        _, scanned = jax.lax.scan(lambda c, _: (c, drop(key, x)), 0, None, length=2)
        return y, pullback(x)[0], tangent, scanned[1]

    for result in passes(key, x):
        assert_same(result, y)


def test_what_is_made_from_bits_is_independent():
    def bits(key):
        return jax.random.bits(key, (50, 50))

    a, b = (bits(stratified_key(KEY, i, 10)) for i in (0, 1))
    assert (a != b).mean() > 0.999
    kept = [jax.random.bernoulli(stratified_key(KEY, i, 10), 0.5, (50, 50)) for i in range(10)]
    counts = np.sum(kept, axis=0)
    assert counts.min() < 4
    assert counts.max() > 6


def test_kernels_refuse_coupled_samples():
    with pytest.raises(ValueError, match="a key of coupled samples"):
        jdropout.dropout(stratified_key(KEY, 0, 10), normal(8, 128), 0.5, implementation="pallas")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 0, 10), ValueError, "key is None"),
        ((KEY, 10, 10), ValueError, "sample must be at least 0 and below .* 10, got 10"),
        ((KEY, -1, 10), ValueError, "got -1"),
        ((KEY, 0.0, 10), TypeError, "sample must be an integer"),
        ((KEY, 0, 251), ValueError, "size must be at most 250, got 251"),
        ((KEY, 0, 0), ValueError, "size"),
        ((KEY, 0, 10, 3), TypeError, "axis_name must be a string, got 3"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_fix(arguments, error, message):
    key, sample, size, *axis = arguments
    with pytest.raises(error, match=message):
        stratified_key(key, sample, size, axis_name=axis[0] if axis else None)


def test_a_traced_sample_has_to_be_a_scalar():
    with pytest.raises(ValueError, match="sample must be a scalar"):
        jax.jit(lambda i: stratified_key(KEY, i, 10))(jnp.arange(3))


# --- Monte Carlo prediction ---------------------------------------------------------------

W = normal(12, 5, seed=3)
X = normal(6, 12)


def linear(key, w, x):
    return jdropout.dropout(key, x, 0.25) @ w


stratified = functools.partial(mc_predict, sampling="stratified")


@pytest.mark.parametrize("options", [{}, {"consistent": True}, {"return_samples": True}])
def test_the_mean_of_a_linear_model_has_no_error(options):
    """Of 8 samples, every input is kept in 6."""
    prediction = stratified(linear, KEY, W, X, num_samples=8, **options)
    np.testing.assert_allclose(prediction.mean, X @ W, rtol=1e-5, atol=1e-5)
    independent = mc_predict(linear, KEY, W, X, num_samples=8, **options)
    assert np.abs(independent.mean - X @ W).mean() > 0.1


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_samples_are_those_of_the_documented_keys(batch_size):
    prediction = stratified(
        linear, KEY, W, X, num_samples=7, batch_size=batch_size, return_samples=True
    )
    size = batch_size or 7
    keys = [stratified_key(at_site(KEY, i // size), i % size, size) for i in range(7)]
    samples = jax.jit(jax.vmap(linear, (0, None, None)))(jnp.stack(keys), W, X)
    np.testing.assert_allclose(prediction.samples, samples, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prediction.mean, samples.mean(0), rtol=1e-4, atol=1e-5)
    assert prediction.num_groups == -(-7 // size)


def test_a_batch_is_never_larger_than_the_number_of_samples():
    prediction = stratified(linear, KEY, W, X, num_samples=8, batch_size=100)
    np.testing.assert_allclose(prediction.mean, X @ W, rtol=1e-5, atol=1e-5)


def curved(key, x):
    """Neither a sum over the units nor far from one."""
    y = jdropout.dropout(key, x, 0.3)
    return jnp.tanh(y @ W) + (y[:, :1] * y[:, 1:2] + y[:, 2:3] * y[:, 3:4])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def repeated(key, repetitions, count, batch_size):
    predict = functools.partial(stratified, curved, num_samples=count, batch_size=batch_size)
    return jax.lax.map(lambda key: predict(key, X), jax.random.split(key, repetitions))


def test_variance_and_standard_error_are_honest():
    """Of ten groups of coupled samples: both are unbiased, and intervals have their coverage."""
    count, repetitions = 60, 800
    predictions = jax.tree.map(np.asarray, repeated(KEY, repetitions, count, 6))
    many = mc_predict(curved, at_site(KEY, "many"), X, num_samples=40_000)
    many = jax.tree.map(np.asarray, many)
    of_means = predictions.mean.var(0, ddof=1)
    assert (of_means / (many.variance / count)).mean() < 0.5  # coupling is worth something
    error = predictions.error_variance.mean(0)
    assert abs((error / of_means).mean() - 1) < 0.05
    variance = predictions.variance.mean(0)
    assert abs((variance / many.variance).mean() - 1) < 0.02
    quantile = stats.t.isf(0.025, count // 6 - 1)
    error = np.abs(predictions.mean - many.mean)
    inside = error < quantile * np.asarray(predictions.standard_error)
    assert abs(inside.mean() - 0.95) < 0.02
    # Control: of independent samples, the error would be far too large.
    assert (predictions.variance.mean(0) / count / of_means).mean() > 2


def test_a_single_group_has_the_error_of_independent_samples_as_a_bound():
    predictions = jax.tree.map(np.asarray, repeated(KEY, 800, 6, 6))
    of_means = predictions.mean.var(0, ddof=1)
    assert (predictions.error_variance.mean(0) > of_means).all()
    np.testing.assert_allclose(
        predictions.error_variance, predictions.variance / 5, rtol=1e-4, atol=1e-7
    )
    many = mc_predict(curved, at_site(KEY, "many"), X, num_samples=40_000)
    ratio = (predictions.variance.mean(0) / np.asarray(many.variance)).mean()
    assert 1 - 1 / 6 < ratio < 1.02


def test_the_default_is_one_group_or_at_least_four_of_ten_or_twenty():
    sizes = [_monte_carlo._check_batch_size(None, n, True) for n in (3, 20, 40, 79, 80, 100)]
    assert sizes == [3, 20, 10, 10, 20, 20]


def test_the_last_group_may_have_fewer_samples():
    prediction = stratified(linear, KEY, W, X, num_samples=22, return_samples=True)
    alone = stratified(linear, KEY, W, X, num_samples=22)
    samples = np.asarray(prediction.samples, np.float64)
    assert prediction.num_groups == 3
    for each in (prediction, alone):
        np.testing.assert_allclose(each.mean, samples.mean(0), rtol=1e-4, atol=1e-5)
        means = [samples[:10].mean(0), samples[10:20].mean(0), samples[20:].mean(0)]
        weights = np.float64([10, 10, 2]).reshape(3, 1, 1)
        error = (weights * (means - samples.mean(0)) ** 2).sum(0) / 2 / 22
        np.testing.assert_allclose(each.variance, samples.var(0) + error, rtol=1e-4)
        np.testing.assert_allclose(each.error_variance, samples.var(0, ddof=1) / 22, rtol=1e-4)


def test_from_four_groups_on_the_error_is_that_of_their_means():
    prediction = stratified(linear, KEY, W, X, num_samples=38, return_samples=True)
    samples = np.asarray(prediction.samples, np.float64)
    groups = [samples[i : i + 10] for i in range(0, 38, 10)]
    deviations = [len(group) * (group.mean(0) - samples.mean(0)) ** 2 for group in groups]
    error = np.sum(deviations, 0) / 3 / 38
    np.testing.assert_allclose(prediction.error_variance, error, rtol=1e-3, atol=1e-6)
    variance = samples.var(0) + error
    np.testing.assert_allclose(prediction.variance, variance, rtol=1e-4)


def test_the_number_of_stratified_samples_may_be_traced():
    predict = jax.jit(lambda count: stratified(linear, KEY, W, X, num_samples=count))
    for count in (25, 45):
        traced, static = predict(count), stratified(linear, KEY, W, X, num_samples=count)
        for name in ("mean", "variance", "error_variance", "num_groups"):
            np.testing.assert_allclose(
                getattr(traced, name), getattr(static, name), rtol=1e-4, atol=1e-6
            )


def test_bad_options_of_sampling_are_named():
    with pytest.raises(ValueError, match="sampling"):
        mc_predict(linear, KEY, W, X, num_samples=8, sampling="latin")
    with pytest.raises(ValueError, match="batch_size must be at most 250 with sampling='strat"):
        stratified(linear, KEY, W, X, num_samples=300, batch_size=251)


class NnxNet(nnx.Module):
    def __init__(self, layer, rngs):
        self.first = nnx.Linear(12, 8, kernel_init=UNIFORM, rngs=rngs)
        self.dropout = layer(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, kernel_init=UNIFORM, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


class LinenNet(linen.Module):
    layer: type = jdropout.linen.Dropout

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(8, kernel_init=UNIFORM)(x))
        x = self.layer(0.5, deterministic=True)(x)
        return linen.Dense(3, kernel_init=UNIFORM)(x)


def test_models_of_flax_have_no_error_if_they_are_linear_behind_the_dropout():
    net = NnxNet(jdropout.nnx.Dropout, nnx.Rngs(0))
    options = dict(num_samples=6, sampling="stratified")
    net.eval()
    mean = jdropout.nnx.mc_predict(net, X, KEY, **options).mean
    np.testing.assert_allclose(mean, net(X), rtol=1e-5, atol=1e-5)
    variables = LinenNet().init(KEY, X)
    mean = jdropout.linen.mc_predict(LinenNet(), variables, X, KEY, **options).mean
    np.testing.assert_allclose(mean, LinenNet().apply(variables, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_flaxs_own_dropout_stays_independent(sampling):
    net = NnxNet(nnx.Dropout, nnx.Rngs(0))
    net.eval()
    mean = jdropout.nnx.mc_predict(net, X, KEY, num_samples=6, sampling=sampling).mean
    assert np.abs(mean - net(X)).mean() > 0.05
    variables = LinenNet(linen.Dropout).init(KEY, X)
    mean = jdropout.linen.mc_predict(
        LinenNet(linen.Dropout), variables, X, KEY, num_samples=6, sampling=sampling
    ).mean
    assert np.abs(mean - LinenNet(linen.Dropout).apply(variables, X)).mean() > 0.05


# --- what is computed once ----------------------------------------------------------------

WIDE = 2048
"""Inputs: the first layer takes nearly all operations."""
FIRST = 2 * 8 * WIDE * 16
"""Operations of the first layer, for 8 examples."""


def flops(predict, *arguments):
    return jax.jit(predict).lower(*arguments).compile().cost_analysis()["flops"]


def assert_first_layer_is_computed_once(predict, *arguments):
    assert FIRST < flops(predict, *arguments) < 1.5 * FIRST


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_layers_before_the_first_dropout_are_computed_once(sampling):
    options = dict(num_samples=10, batch_size=10, sampling=sampling)
    x = np.ones((8, WIDE), np.float32)

    def function(key, w, x):
        return jdropout.dropout(key, jax.nn.relu(x @ w), 0.5) @ np.ones((16, 2), np.float32)

    w = np.ones((WIDE, 16), np.float32)
    assert_first_layer_is_computed_once(
        functools.partial(mc_predict, function, **options), KEY, w, x
    )

    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(WIDE, 16, kernel_init=UNIFORM, rngs=rngs), jdropout.nnx.Dropout(0.5)
    )
    assert_first_layer_is_computed_once(
        lambda x, key: jdropout.nnx.mc_predict(net, x, key, **options), x, KEY
    )
    model = linen.Sequential(
        [linen.Dense(16, kernel_init=UNIFORM), jdropout.linen.Dropout(0.5, deterministic=True)]
    )
    variables = model.init(KEY, x)
    predict = functools.partial(jdropout.linen.mc_predict, model, **options)
    assert_first_layer_is_computed_once(predict, variables, x, KEY)


def test_control_a_dropout_before_the_first_layer_computes_it_for_every_sample():
    def function(key, w, x):
        return jdropout.dropout(key, x, 0.5) @ w

    predict = functools.partial(mc_predict, function, num_samples=10, batch_size=10)
    w, x = np.ones((WIDE, 16), np.float32), np.ones((8, WIDE), np.float32)
    assert flops(predict, KEY, w, x) > 9 * FIRST


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.body = jdropout.nnx.Dropout(0.5, rngs=rngs)
        self.layer = nnx.Linear(WIDE, 16, kernel_init=UNIFORM, rngs=rngs)
        self.head = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layer(self.body(x, deterministic=False)))


class DeepLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jdropout.linen.Dropout(0.5, name="body")(x, deterministic=False)
        x = linen.Dense(16, kernel_init=UNIFORM, name="layer")(x)
        return linen.Dropout(0.5, name="head")(x, deterministic=True)


@pytest.mark.parametrize("only", [nnx.Dropout, lambda path, _: "head" in path])
def test_only_the_chosen_layers_of_nnx_draw(only):
    if only is nnx.Dropout:  # of which ours is a subclass
        only = (lambda _, layer: type(layer) is nnx.Dropout, int)
    net, x = Deep(nnx.Rngs(0)), np.ones((8, WIDE), np.float32)
    predict = functools.partial(jdropout.nnx.mc_predict, num_samples=10, batch_size=10, only=only)
    samples = jax.jit(functools.partial(predict, net, return_samples=True))(x, KEY).samples
    hidden = np.asarray(net.layer(x))
    kept = np.asarray(samples) != 0
    np.testing.assert_allclose(samples, np.where(kept, 2 * hidden, 0), rtol=1e-4)
    assert 0.3 < kept.mean() < 0.7
    assert_first_layer_is_computed_once(functools.partial(predict, net), x, KEY)


@pytest.mark.parametrize("only", [lambda path, _: "head" in path, linen.Dropout])
def test_only_the_chosen_layers_of_linen_draw(only):
    if only is linen.Dropout:
        only = (lambda _, layer: type(layer) is linen.Dropout,)
    net, x = DeepLinen(), np.ones((8, WIDE), np.float32)
    variables = net.init({"params": KEY, "dropout": KEY}, x)
    predict = functools.partial(
        jdropout.linen.mc_predict, net, num_samples=10, batch_size=10, only=only
    )
    samples = jax.jit(functools.partial(predict, return_samples=True))(variables, x, KEY).samples
    layer = variables["params"]["layer"]
    hidden = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    kept = np.asarray(samples) != 0
    np.testing.assert_allclose(samples, np.where(kept, 2 * hidden, 0), rtol=1e-4)
    assert 0.3 < kept.mean() < 0.7
    assert_first_layer_is_computed_once(predict, variables, x, KEY)


def test_a_filter_that_finds_no_layer_is_an_error():
    message = "model must have a dropout layer .* that only=.* finds"
    with pytest.raises(ValueError, match=message):
        jdropout.nnx.mc_predict(Deep(nnx.Rngs(0)), X, KEY, num_samples=4, only=nnx.Linear)
    variables = LinenNet().init(KEY, X)
    with pytest.raises(ValueError, match=message):
        jdropout.linen.mc_predict(LinenNet(), variables, X, KEY, num_samples=4, only=linen.Dense)
