"""Masks are what probability theory says of independent Bernoulli variables.

Every key is fixed, so a test either always passes or always fails. What is stated is how
likely a *perfect* generator would be to fail: FALSE_ALARM = 1e-6 for the whole file, shared
evenly by at most TESTS = 100 tests (1e-8 each; a test counts them), and inside a test by
Bonferroni over its p-values. Every test applies its statistics to a control as well, a mask
with a known flaw, which they must reject.

The long runs, with 2^30 bits at each of three rates, take under two minutes:

    python -m pytest tests/test_statistics.py -m slow
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import jdropout
from jdropout.testing import assert_unbiased

FALSE_ALARM = 1e-6
TESTS = 100


def rejected(*p_values):
    """Whether a perfect generator does as badly with probability FALSE_ALARM / TESTS or less."""
    p_values = np.concatenate([np.ravel(p) for p in p_values])
    assert np.all((p_values >= 0) & (p_values <= 1))
    return bool(p_values.min() * p_values.size <= FALSE_ALARM / TESTS)


def keep_mask(key, rate, shape, **options):
    return np.asarray(jdropout.keep_mask(key, rate, shape, **options))


def keep_probability(rate, **options):
    return 1 - jdropout.effective_rate(rate, **options)


@pytest.fixture
def optimized():
    """For tests whose programs run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def flaw(seed=0):
    """Randomness for the controls, from another generator."""
    return np.random.default_rng(seed)


# --- p-values, two-sided except for chi-squared -------------------------------------------


def two_sided(below, above):
    return np.minimum(1, 2 * np.minimum(below, above))


def normal_p_values(z):
    return special.erfc(np.abs(z) / math.sqrt(2))


def binomial_p_values(successes, n, probability):
    distribution = stats.binom(n, probability)
    return two_sided(distribution.cdf(successes), distribution.sf(np.asarray(successes) - 1))


def poisson_p_value(count, mean):
    return two_sided(stats.poisson.cdf(count, mean), stats.poisson.sf(count - 1, mean))


def chi_squared_p_value(observed, probabilities, least=16):
    """Of counts against cell probabilities; neighbouring cells are pooled up to `least`."""
    observed = np.asarray(observed)
    expected = observed.sum() * np.asarray(probabilities)
    assert math.isclose(expected.sum(), observed.sum())
    ends = [0]
    for cell in range(len(expected)):
        if expected[ends[-1] : cell + 1].sum() >= least:
            ends.append(cell + 1)
    starts = ends[:-1]  # what is left over joins the last full cell
    assert len(starts) > 1
    observed, expected = (np.add.reduceat(counts, starts) for counts in (observed, expected))
    return stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(starts) - 1)


def product_z(first, second, keep):
    """Standardised covariance of two aligned masks, of known keep probability.

    Products of centred variables have mean 0 and standard deviation keep (1 - keep), and are
    uncorrelated even where pairs overlap, as those at a lag do. With a skewness under 0.02
    the normal tail is right to a factor of three at z = 7.
    """
    n = first.size
    assert first.shape == second.shape
    assert (1 - 2 * keep) ** 2 / (keep * (1 - keep) * math.sqrt(n)) < 0.02
    assert n >= 1 << 18
    both = np.count_nonzero(first & second)
    either = np.count_nonzero(first) + np.count_nonzero(second)
    return (both - keep * either + n * keep**2) / (keep * (1 - keep) * math.sqrt(n))


def correlation_z(rows, columns=None):
    """Standardised correlations of every row with every column; each is n fair coins."""
    n = rows.shape[1]
    assert n <= 1 << 24, "the float32 sums have to be exact"
    rows = np.where(rows, np.float32(1), np.float32(-1))
    columns = rows if columns is None else np.where(columns, np.float32(1), np.float32(-1))
    return rows @ columns.T / math.sqrt(n)


def pair_p_values(rows):
    """Of every pair of rows, each n fair coins, and of the sum of all squared correlations."""
    z = correlation_z(rows)[np.triu_indices(len(rows), k=1)].astype(np.float64)
    together = stats.chi2(z.size)
    square = (z**2).sum()
    return [*normal_p_values(z), two_sided(together.cdf(square), together.sf(square))]


# --- the budget ---------------------------------------------------------------------------


def test_there_are_no_more_tests_than_the_budget_allows(request):
    items = [item for item in request.session.items if item.path == request.path]
    assert 0 < len(items) <= TESTS


def test_statistics_are_calibrated_on_a_trusted_generator():
    """NumPy's PCG64; n = 64 values of each statistic, by Kolmogorov-Smirnov; 1e-8."""
    samples = {"binomial": [], "chi squared": [], "product": [], "pair": [], "together": []}
    for seed in range(64):
        mask = flaw(seed).random((1024, 1024)) < 0.3
        counts = np.bincount(mask.sum(axis=1), minlength=1025)
        probabilities = stats.binom.pmf(np.arange(1025), 1024, 0.3)
        samples["binomial"].append(binomial_p_values(np.count_nonzero(mask), mask.size, 0.3))
        samples["chi squared"].append(chi_squared_p_value(counts, probabilities))
        samples["product"].append(normal_p_values(product_z(mask[1:], mask[:-1], 0.3)))
        *pairs, together = pair_p_values(flaw(seed).random((8, 4096)) < 0.5)
        samples["pair"].append(pairs[0])
        samples["together"].append(together)
    assert not rejected([stats.kstest(values, "uniform").pvalue for values in samples.values()])
    for values in samples.values():
        assert rejected(stats.kstest(np.power(values, 8), "uniform").pvalue)


# --- how much is kept ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "precision"),
    [
        *itertools.product([0.001, 0.1, 0.5, 0.9, 0.999], [16, 32]),
        (0.001, None),
        (1e-4, None),
        (1e-5, None),
    ],
)
def test_kept_fraction_is_that_of_the_effective_rate(rate, precision):
    """n = 2^22 bits; false alarm 1e-8."""
    shape = (2048, 2048)
    n = math.prod(shape)
    keep = keep_probability(rate, precision=precision)
    step = 2**-32 if precision == 32 or (rate <= 0.001 and precision is None) else 2**-16
    assert abs(1 - keep - rate) <= step / 2

    def p_value(rate):
        mask = keep_mask(jax.random.key(1), rate, shape, precision=precision)
        return binomial_p_values(np.count_nonzero(mask), n, keep)

    assert not rejected(p_value(rate))
    ten_sigma = 10 * math.sqrt(keep * (1 - keep) / n)
    assert rejected(p_value(rate + ten_sigma if rate < 0.5 else rate - ten_sigma))


@pytest.mark.parametrize("precision", [16, 32])
def test_kept_fraction_is_that_of_a_traced_rate(precision):
    """n = 2^20 bits at each of 16 rates; false alarm 1e-8."""
    n = 1 << 20

    @jax.jit
    def count(rate):
        mask = jdropout.keep_mask(jax.random.key(2), rate, (1024, 1024), precision=precision)
        return mask.sum(), jdropout.effective_rate(rate, precision=precision)

    counts, effective = map(np.array, zip(*map(count, jnp.linspace(0.01, 0.99, 16)), strict=True))
    keep = 1 - effective.astype(np.float64)
    np.testing.assert_allclose(effective, jnp.linspace(0.01, 0.99, 16), rtol=0, atol=2**-17)
    assert not rejected(binomial_p_values(counts, n, keep))
    assert rejected(binomial_p_values(counts, n, keep + 0.005))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("axis", [0, 1], ids=["per column", "per row"])
def test_number_kept_in_a_row_or_column_is_binomial(axis, rate):
    """n = 2^14 sums of 256 bits, chi-squared; false alarm 1e-8."""
    keep = keep_probability(rate)
    mask = keep_mask(jax.random.key(3), rate, (256, 1 << 14) if axis == 0 else (1 << 14, 256))
    mask = mask.T if axis == 0 else mask

    def p_value(mask):
        counts = np.bincount(mask.sum(axis=1), minlength=257)
        return chi_squared_p_value(counts, stats.binom.pmf(np.arange(257), 256, keep))

    assert not rejected(p_value(mask))
    doubled = mask.copy()  # the variance is a quarter too large
    doubled[:, 128:160] = doubled[:, :32]
    assert rejected(p_value(doubled))
    stratified = mask.copy()  # exactly so many of these 64: the variance is a quarter too small
    stratified[:, :64] = flaw().permuted(np.arange(64) < round(64 * keep))
    assert rejected(p_value(stratified))


def test_every_position_is_kept_equally_often_over_keys():
    """n = 2^14 keys at 96 positions and their 4560 pairs; false alarm 1e-8."""
    keys = jax.random.split(jax.random.key(4), 1 << 14)
    masks = np.array(jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (12, 8)))(keys))
    masks = masks.reshape(len(keys), -1)

    def fractions(masks):
        return binomial_p_values(masks.sum(axis=0), len(masks), 0.5)

    assert not rejected(fractions(masks), pair_p_values(masks.T))
    biased = masks.copy()
    biased[::8, 40] = True
    assert rejected(fractions(biased))
    linked = masks.copy()
    linked[::8, 40] = linked[::8, 41]
    assert not rejected(fractions(linked))
    assert rejected(pair_p_values(linked.T))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shared_fates_are_independent_along_the_other_axes(axis):
    """n = 2^19 fates, their fraction and 35 offsets; false alarm 1e-8."""
    keep = keep_probability(0.1)
    shape = [1024, 512]
    shape.insert(axis, 3)
    mask = keep_mask(jax.random.key(5), 0.1, shape, broadcast_dims=(axis,))
    fates = mask.take(0, axis=axis)
    assert (mask == np.expand_dims(fates, axis)).all()

    def p_values(fates):
        fraction = binomial_p_values(np.count_nonzero(fates), fates.size, keep)
        return [fraction, *normal_p_values(neighbour_z(fates, keep))]

    assert not rejected(p_values(fates))
    assert rejected(p_values(fates.repeat(2, axis=0)[:1024]))


# --- the output ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_output_has_the_mean_of_the_input(rate):
    """n = 2^22 elements; false alarm 1e-8."""
    keep = keep_probability(rate)
    magnitude, sign = flaw().uniform(1, 2, (2048, 2048)), flaw(1).choice([-1, 1], (2048, 2048))
    x = (magnitude * sign).astype(np.float32)
    y = np.asarray(jdropout.dropout(jax.random.key(6), x, rate)).astype(np.float64)
    x = x.astype(np.float64)

    def p_value(y):
        return normal_p_values((x * (y - x)).sum() / math.sqrt((x**4).sum() * (1 - keep) / keep))

    assert not rejected(p_value(y))
    assert rejected(p_value(y * keep)), "the scale is missing"
    if rate == 0.1:  # an 8-bit threshold with the scale of the nominal rate is 0.17 % off
        eight_bits = flaw(2).integers(0, 256, x.shape) < math.floor(0.9 * 256)
        assert rejected(p_value(x * eight_bits / 0.9))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_element_has_the_mean_of_the_input_over_keys(rate):
    """n = 2^24 or 2^27 elements, all of them, each of 1071, and each call; false alarm 1e-8."""
    x = flaw().uniform(1, 2, (51, 21)).astype(np.float32)
    options = dict(key=jax.random.key(6), rate=rate, false_alarm_rate=FALSE_ALARM / TESTS)
    assert_unbiased(lambda key, x: jdropout.dropout(key, x, rate), x, **options)

    def one_position_is_always_kept(key, x):
        return jdropout.dropout(key, x, rate).at[50, 20].set(x[50, 20] / (1 - rate))

    with pytest.raises(AssertionError, match=r"1 of 1071 elements .* at \(50, 20\)"):
        assert_unbiased(one_position_is_always_kept, x, **options)


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_output_has_the_variance_of_inverted_dropout(rate):
    """n = 2^22 elements; false alarm 1e-8. (At rate 1/2 every deviation is the same.)"""
    keep = keep_probability(rate)
    drop = 1 - keep
    x = flaw().uniform(1, 2, (2048, 2048)).astype(np.float32)
    y = np.asarray(jdropout.dropout(jax.random.key(7), x, rate)).astype(np.float64)
    x = x.astype(np.float64)
    mean = (x**2).sum() * drop / keep
    variance = (x**4).sum() * (drop**4 / keep**3 + drop - (drop / keep) ** 2)

    def p_value(y):
        return normal_p_values((((y - x) ** 2).sum() - mean) / math.sqrt(variance))

    assert not rejected(p_value(y))
    fewer = keep - 0.01
    assert rejected(p_value(x * (flaw(1).random(x.shape) < fewer) / fewer)), "an unbiased output"


@pytest.mark.parametrize("rate", [0.001, 0.1, 1 / 3, 0.9])
def test_expectation_is_exact_because_the_scale_belongs_to_the_effective_rate(rate):
    """No chance involved: what is kept, times its probability, is x to a float32 rounding."""
    x = flaw().uniform(1, 2, (64, 256)).astype(np.float32)
    y = np.asarray(jdropout.dropout(jax.random.key(8), x, rate)).astype(np.float64)
    kept = y != 0

    def error(keep):
        return np.abs(y[kept] * keep / x[kept] - 1)

    assert error(keep_probability(rate)).max() < 2e-7
    if rate == 0.1:  # the mask has not the nominal rate, and a scale of 1 / 0.9 would show
        assert error(1 - rate).min() > 5e-6


# --- neighbours ---------------------------------------------------------------------------


def offsets(rank):
    """Lags 1 to 8 along every axis, both diagonals of the last two, and across all axes.

    Also 16, 32 and 64 rows, the distances of what the packed evaluation joins in one word.
    """
    units = np.eye(rank, dtype=int)
    rows = units[max(rank - 2, 0)]
    ways = list(units)
    if rank > 1:
        ways += [units[-2] + units[-1], units[-2] - units[-1]]
    if rank > 2:
        ways += [units.sum(axis=0)]
    return [lag * way for lag in range(1, 9) for way in ways] + [lag * rows for lag in (16, 32, 64)]


def neighbour_z(mask, keep):
    """Covariances of a mask with itself at every offset that its shape has room for."""

    def part(offset):
        return tuple(
            slice(max(0, lag), size + min(0, lag))
            for lag, size in zip(offset, mask.shape, strict=True)
        )

    return np.array(
        [
            product_z(mask[part(offset)], mask[part(-offset)], keep)
            for offset in offsets(mask.ndim)
            if all(2 * abs(offset) <= mask.shape)
        ]
    )


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ((1 << 22,), 0.5),
        ((1 << 20, 4), 0.5),
        ((4, 1 << 20), 0.5),
        ((2048, 2048), 0.05),
        ((2048, 2048), 0.5),
        ((2048, 2048), 0.9),
        ((2047, 2049), 0.5),
        ((64, 256, 256), 0.1),
        ((63, 250, 257), 0.5),
        ((16, 16, 128, 128), 0.5),
    ],
)
def test_neighbours_are_independent_in_every_direction(shape, rate):
    """n = 2^22 elements, 11 to 59 offsets; false alarm 1e-8."""
    keep = keep_probability(rate)
    mask = keep_mask(jax.random.key(9), rate, shape)
    assert not rejected(normal_p_values(neighbour_z(mask, keep)))
    for axis in range(mask.ndim):
        # One element in 64 takes the fate of its neighbour: a correlation of 1.6 %.
        correlated = np.moveaxis(mask.copy(), axis, 0)
        follows = flaw(axis).random(correlated[1:].shape, np.float32) < 1 / 64
        correlated[1:][follows] = correlated[:-1][follows]
        assert rejected(normal_p_values(neighbour_z(np.moveaxis(correlated, 0, axis), keep)))


def test_duplicated_rows_are_noticed_at_every_distance():
    """The control of the test above for rows: one pair of rows in 64 is equal."""
    mask = keep_mask(jax.random.key(9), 0.5, (2048, 2048))
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
        duplicated = mask.copy()
        duplicated[lag::64] = duplicated[:-lag:64]
        assert rejected(normal_p_values(neighbour_z(duplicated, 0.5)))


def lanes_of(mask):
    """Booleans (blocks, 4): the rows 4g to 4g + 3 of a column share one cipher block."""
    rows, columns = mask.shape
    return mask.reshape(rows // 4, 4, columns).transpose(0, 2, 1).reshape(-1, 4)


def from_lanes(lanes, columns):
    return lanes.reshape(-1, columns, 4).transpose(0, 2, 1).reshape(-1, columns)


def test_rows_of_one_cipher_block_are_independent():
    """n = 2^20 blocks, the parity of all 11 sets of two to four rows; false alarm 1e-8."""
    sets = [s for size in (2, 3, 4) for s in itertools.combinations(range(4), size)]
    mask = keep_mask(jax.random.key(10), 0.5, (4096, 1024))

    def p_values(mask):
        lanes = mask.reshape(-1, 4, mask.shape[1])
        odd = [np.count_nonzero(np.logical_xor.reduce(lanes[:, s], axis=1)) for s in sets]
        return binomial_p_values(np.array(odd), mask.size // 4, 0.5)

    assert not rejected(p_values(mask))
    for first, second in itertools.combinations(range(4), 2):
        equal = mask.copy()
        equal[first::64] = equal[second::64]  # in one group of 16
        assert rejected(p_values(equal))
    parity = mask.copy()  # of these four rows any three are independent
    parity[3::64] = parity[0::64] ^ parity[1::64] ^ parity[2::64]
    assert rejected(p_values(parity))


def pattern_counts(mask):
    """How often each of the 16 patterns of four rows comes."""
    lanes = mask.view(np.uint8).reshape(-1, 4, mask.shape[1])
    patterns = lanes[:, 0] | lanes[:, 1] << 1 | lanes[:, 2] << 2 | lanes[:, 3] << 3
    return np.bincount(patterns.ravel(), minlength=16)


def pattern_p_value(counts, keep):
    kept = np.array([pattern.bit_count() for pattern in range(16)])
    return chi_squared_p_value(counts, keep**kept * (1 - keep) ** (4 - kept))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_patterns_of_a_cipher_block_have_their_probabilities(rate):
    """n = 2^20 blocks, chi-squared over 16 cells; false alarm 1e-8."""
    keep = keep_probability(rate)
    mask = keep_mask(jax.random.key(11), rate, (4096, 1024))
    assert not rejected(pattern_p_value(pattern_counts(mask), keep))
    equal = mask.copy()
    equal[0::64] = equal[1::64]
    assert rejected(pattern_p_value(pattern_counts(equal), keep))
    fewer = keep_mask(jax.random.key(11), rate + 0.005, (4096, 1024))
    assert rejected(pattern_p_value(pattern_counts(fewer), keep))


def test_blocks_whose_counters_differ_in_one_bit_are_independent():
    """n = 2^17 pairs of blocks for each of the 18 bits of a counter; false alarm 1e-8."""
    columns, bits = 256, 18
    counter = np.arange(1 << bits)

    def p_values(mask):
        lanes = lanes_of(mask)
        low = [counter[counter & (1 << bit) == 0] for bit in range(bits)]
        z = [product_z(lanes[i], lanes[i | (1 << bit)], 0.5) for bit, i in enumerate(low)]
        return normal_p_values(np.array(z))

    mask = keep_mask(jax.random.key(12), 0.5, (4096, columns))
    assert mask.size == 4 << bits
    assert not rejected(p_values(mask))
    # A multiplicative hash of the counter: fast, and at a glance as random.
    hashed = (4 * counter[:, None] + np.arange(4)).astype(np.uint32) * np.uint32(0x9E3779B9)
    hashed = hashed ^ hashed >> np.uint32(16)
    weak = from_lanes(hashed >> np.uint32(31) == 0, columns)
    assert not rejected(binomial_p_values(np.count_nonzero(weak), weak.size, 0.5))
    assert rejected(p_values(weak))


@pytest.mark.parametrize(("rows", "columns", "keys"), [(32, 1 << 18, 1), (40, 1 << 14, 64)])
def test_columns_collide_as_often_as_random_numbers(rows, columns, keys):
    """2^18 columns of 32 rows: 8 collisions expected. 2^20 of 40, of 64 keys: 0.5. 1e-8."""
    masks = [keep_mask(jax.random.key(i), 0.5, (rows, columns)) for i in range(keys)]
    assert not rejected(collision_p_value(masks))
    repeated = masks[-1].copy()
    repeated[:, -64:] = masks[0][:, :64]
    assert rejected(collision_p_value([*masks[:-1], repeated]))


def test_no_two_columns_of_64_rows_are_equal():
    """2^18 columns: one collision in 5e8 runs, which counts; false alarm 1e-8."""
    mask = keep_mask(jax.random.key(13), 0.5, (64, 1 << 18))
    assert not rejected(collision_p_value([mask]))
    repeated = mask.copy()
    repeated[:, 1000] = repeated[:, 200_000]
    assert rejected(collision_p_value([repeated]))


def collision_p_value(masks):
    """Of the number of columns that repeat another, read as binary numbers."""
    packed = np.concatenate([np.packbits(mask, axis=0).T for mask in masks])
    n, size = packed.shape
    numbers = np.zeros((n, 8), np.uint8)
    numbers[:, :size] = packed
    collisions = n - len(np.unique(numbers.view(np.uint64)))
    return poisson_p_value(collisions, n * (n - 1) / 2 / 2 ** len(masks[0]))


# --- the digits under the mask ------------------------------------------------------------


def leading_nibble(key, shape):
    """The four leading bits of the uniform number under every element.

    Masks of one key are nested: an element's number of drops at rates 1/16 ... 15/16 tells
    in which sixteenth its number lies.
    """
    drops = sum(
        (~jdropout.keep_mask(key, jnp.float32(i / 16), shape)).astype(jnp.uint8)
        for i in range(1, 16)
    )
    return np.asarray(drops)


def test_leading_bits_are_uniform():
    """n = 2^22 numbers, chi-squared over 16 cells; false alarm 1e-8."""
    counts = np.bincount(leading_nibble(jax.random.key(14), (2048, 2048)).ravel(), minlength=16)
    assert not rejected(chi_squared_p_value(counts, np.full(16, 1 / 16)))
    eight_bits = np.bincount((flaw().integers(0, 256, 1 << 22) * 15) >> 8, minlength=16)
    assert rejected(chi_squared_p_value(eight_bits, np.full(16, 1 / 16)))


def test_leading_bits_of_neighbours_are_independent():
    """n = 2^20 pairs in each of 8 places, chi-squared over 256 cells; false alarm 1e-8."""
    nibbles = leading_nibble(jax.random.key(15), (4096, 1024))

    def p_values(nibbles):
        blocks = nibbles.reshape(-1, 4, nibbles.shape[1])
        pairs = [(blocks[:, a], blocks[:, b]) for a, b in itertools.combinations(range(4), 2)]
        pairs += [(nibbles[::4, 1:], nibbles[::4, :-1]), (blocks[1:, 0], blocks[:-1, 3])]
        tables = [np.bincount((16 * a + b).ravel(), minlength=256) for a, b in pairs]
        return [chi_squared_p_value(table, np.full(256, 1 / 256)) for table in tables]

    assert not rejected(p_values(nibbles))
    for bit in range(4):  # one bit in 32 is copied from the next lane
        linked = nibbles.copy()
        linked[2::128] = linked[2::128] & ~np.uint8(1 << bit) | linked[3::128] & (1 << bit)
        assert rejected(p_values(linked))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("precision", "step"), [(16, 2**-16), (32, 2**-18)])
def test_bits_where_the_first_digit_ends_and_the_second_begins_are_uniform(precision, step):
    """n = 2^24 numbers, 16 cells of 2^-16 or of 2^-18 and the rest; false alarm 1e-8."""
    n = 1 << 24

    @jax.jit
    def count(rate):
        mask = jdropout.keep_mask(jax.random.key(16), rate, (4096, 4096), precision=precision)
        return n - mask.sum()

    def p_value(drops):
        cells = np.diff(drops, prepend=0, append=n)
        return chi_squared_p_value(cells, [step] * 16 + [1 - 16 * step])

    drops = np.array([count(i * jnp.float32(step)) for i in range(1, 17)])
    assert not rejected(p_value(drops))
    assert rejected(p_value(np.repeat(drops[1::2], 2))), "without the last bit"


# --- keys ---------------------------------------------------------------------------------


def keys_of(family):
    root = jax.random.key(17)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    count = jnp.arange(128)
    if family == "seeds in succession":
        return jax.vmap(jax.random.key)(count)
    if family == "fold_in siblings":
        return fold_in(root, count)
    if family == "split children":
        return jax.random.split(root, 128)
    if family == "steps and layers":
        return jax.vmap(fold_in, in_axes=(0, None))(fold_in(root, count[:16]), count[:8]).ravel()
    if family == "parents and children":
        parents = jax.vmap(jax.random.key)(count[:16])
        children = jax.vmap(fold_in, in_axes=(0, None))(parents, count[:7])
        return jnp.concatenate([parents, children.ravel()])
    if family == "generations":
        generations = [root]
        for _ in range(63):
            generations.append(jax.random.fold_in(generations[-1], 0))
        return jnp.stack(generations)
    if family == "a training loop's splits":
        loop = []
        for _ in range(32):
            root, key = jax.random.split(root)
            loop += [root, key]
        return jnp.stack(loop)
    if family == "one bit apart":
        words = np.tile(np.asarray(jax.random.key_data(root)), (65, 1))
        for bit in range(64):
            words[bit, bit // 32] ^= np.uint32(1 << bit % 32)
        return jax.random.wrap_key_data(jnp.asarray(words))
    if family == "rbg seeds in succession":
        return jax.vmap(lambda seed: jax.random.key(seed, impl="rbg"))(count)
    raise AssertionError(family)


@pytest.mark.parametrize(
    "family",
    [
        "seeds in succession",
        "fold_in siblings",
        "split children",
        "steps and layers",
        "parents and children",
        "generations",
        "a training loop's splits",
        "one bit apart",
        "rbg seeds in succession",
    ],
)
def test_masks_of_related_keys_are_independent(family):
    """n = 2^16 bits for 64 to 128 keys, all pairs; false alarm 1e-8."""
    masks = jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (256, 256)))(keys_of(family))
    masks = np.array(masks).reshape(len(masks), -1)
    assert not rejected(pair_p_values(masks))
    related = masks.copy()  # one pair shares one element in 16
    related[5, ::16] = related[40, ::16]
    assert rejected(pair_p_values(related))
    related[:, ::16] = masks[:, ::16]
    related[:, ::128] = masks[0, ::128]  # every pair a little: that shows in the sum
    assert rejected(pair_p_values(related))


def test_masks_of_different_key_implementations_are_independent():
    """n = 2^16 bits for 2 x 64 keys with the same seeds, all pairs; false alarm 1e-8."""
    masks = [
        jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (256, 256)))(
            jax.vmap(lambda seed, impl=impl: jax.random.key(seed, impl=impl))(jnp.arange(64))
        )
        for impl in ("threefry2x32", "rbg")
    ]
    masks = np.concatenate(masks).reshape(128, -1)
    assert not rejected(pair_p_values(masks))
    masks[70, ::16] = masks[2, ::16]
    assert rejected(pair_p_values(masks))


def test_masks_are_independent_of_what_else_is_drawn_from_their_keys():
    """n = 2^16 blocks; masks of a key and 8 children against their draws; false alarm 1e-8.

    In JAX the words of ``fold_in(key, i)`` are the key's own cipher block number i, and
    ``bits`` is made of the same: a law that enciphered small counters under the key itself
    would make its masks of the words of the child keys.
    """
    n = 1 << 16
    root = jax.random.key(18)
    family = [root, *(jax.random.fold_in(root, i) for i in range(8))]

    def bit_planes(words):
        return np.unpackbits(np.asarray(words).view(np.uint8).reshape(n, -1), axis=1).T > 0

    def draws(key):
        children = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n))
        return [
            [jax.random.bernoulli(key, 0.5, (n,)), jax.random.uniform(key, (n,)) < 0.5],
            [jax.random.normal(key, (n,)) < 0],
            bit_planes(jax.random.bits(key, (n,))),
            bit_planes(jax.random.key_data(children)),
        ]

    drawn = np.concatenate([np.asarray(coins) for key in family for coins in draws(key)])
    assert drawn.shape == (len(family) * (3 + 32 + 64), n)

    def p_values(lanes):
        return normal_p_values(correlation_z(lanes, drawn))

    masks = [lanes_of(keep_mask(key, 0.5, (1024, 256))).T for key in family]
    nibbles = lanes_of(leading_nibble(root, (1024, 256))).T
    lower_bits = [(nibbles >> bit) & 1 == 1 for bit in range(3)]
    assert not rejected(p_values(np.concatenate(masks + lower_bits)))
    # The law without its mask key: four fields of the key's block at the element's counter.
    blocks = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, jnp.arange(n))
    fields = np.asarray(jax.random.key_data(blocks)).view(np.uint16)
    assert rejected(p_values(fields.T < 1 << 15))
    partly = masks[0].copy()
    partly[:, ::16] = np.asarray(jax.random.bernoulli(root, 0.5, (n,)))[::16]
    assert rejected(p_values(partly))


# --- long runs ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_long_run_keeps_the_fraction_the_patterns_and_the_independence(rate):
    """n = 2^30 bits of 64 keys: fraction, 2^28 blocks and 35 offsets; false alarm 1e-8."""
    keep = keep_probability(rate)
    keys = jax.random.split(jax.random.key(19), 64)
    kept, patterns, z, flawed = 0, 0, 0, 0
    for key in keys:
        mask = keep_mask(key, rate, (4096, 4096)).copy()
        kept += np.count_nonzero(mask)
        patterns += pattern_counts(mask)
        z += neighbour_z(mask, keep) / math.sqrt(len(keys))
        mask[1::1024] = mask[::1024]  # a correlation of 0.1 %
        flawed += neighbour_z(mask, keep) / math.sqrt(len(keys))
    fraction = binomial_p_values(kept, 1 << 30, keep)
    assert not rejected(fraction, pattern_p_value(patterns, keep), normal_p_values(z))
    assert rejected(binomial_p_values(kept, 1 << 30, keep + 0.0003))
    assert rejected(pattern_p_value(patterns, keep + 0.0003))
    assert rejected(normal_p_values(flawed))


@pytest.mark.slow
def test_masks_of_4096_seeds_are_independent():
    """n = 2^14 bits for 4096 keys, 8 million pairs; false alarm 1e-8."""
    keys = jax.vmap(jax.random.key)(jnp.arange(4096))
    masks = jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (128, 128)))(keys)
    masks = np.array(masks).reshape(4096, -1)
    assert not rejected(pair_p_values(masks))
    masks[4000, ::8] = masks[7, ::8]
    assert rejected(pair_p_values(masks))


@pytest.mark.slow
def test_many_columns_collide_as_often_as_random_numbers():
    """2^23 columns of 40 rows, of 8 keys: 32 collisions expected; false alarm 1e-8."""
    masks = [keep_mask(jax.random.key(i), 0.5, (40, 1 << 20)).copy() for i in range(8)]
    assert not rejected(collision_p_value(masks))
    masks[3][:, :64] = masks[5][:, :64]
    assert rejected(collision_p_value(masks))


def test_monte_carlo_samples_of_a_linear_model_have_its_mean_and_variance(key):
    """n = 2^16 samples by vmap over keys; false alarm 1e-8.

    With w * dropout(x) summed: mean w @ x, variance sum((w x)^2) r / (1 - r).
    """
    n, rate = 1 << 16, 0.3
    w, x = np.linspace(-1, 1, 64, dtype=np.float32), np.linspace(0.5, 2, 64, dtype=np.float32)
    keys = jax.random.split(key, n)
    r = jdropout.effective_rate(rate)
    mean, variance = float((w * x).sum()), float(((w * x) ** 2).sum()) * r / (1 - r)

    def p_values(key_of):
        samples = jax.vmap(lambda k: (w * jdropout.dropout(key_of(k), x, rate)).sum())(keys)
        deviations = np.asarray(samples, np.float64) - mean
        squares = deviations**2
        z = [deviations.mean() / math.sqrt(variance / n)]
        z.append((squares.mean() - variance) / math.sqrt(max(squares.var(), 1e-9) / n))
        return normal_p_values(np.array(z))

    assert not rejected(p_values(lambda k: k))
    assert rejected(p_values(lambda _: key))  # one mask for all samples
