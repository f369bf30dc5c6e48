"""The functions of the family in one table: what each computes, in NumPy, and what it can do.

`test_contract.py` holds every row to the same promises. A formula is written in NumPy from the
docstring of its function and takes its random numbers from the twin of the law, so that a promise
never compares the library with itself.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
from scipy import special

import jdropout

RATE = 0.3
RATES = (0.1, 0.5, 0.9)
SELU_FLOOR = -1.7580993408473766
UNKNOWN, PROTECTED = 3, (0, 7)

NARROW = (jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
INEXACT = (*NARROW, jnp.float64, jnp.complex64, jnp.complex128)
SOME = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.complex64)
INTEGERS = (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32, jnp.int64)


class Draw:
    """The twin's random numbers for one call."""

    def __init__(self, key, *, site=(), start=None, whole=None, precision=None, sample=None):
        self.words = np.asarray(law_twin.at_site(np.asarray(jax.random.key_data(key)), site))
        self.start, self.whole, self.precision, self.sample = start, whole, precision, sample

    def keep(self, rate, shape, shared=()):
        place = (self.start, self.whole, self.precision, self.sample)
        return law_twin.keep_mask(self.words, rate, shape, shared, *place)

    def kept(self, rate):
        """The probability of keeping, as rounded to the bits of the rate."""
        threshold, digits = law_twin.threshold(rate, self.precision)
        return threshold / 2 ** (16 * digits)

    def uniform(self, shape, shared=()):
        numbers = law_twin.uniform(self.words, shape, shared, self.start, self.whole, self.sample)
        return (numbers.astype(np.float64) + 0.5) / 2**32

    def subset(self, rate, size, groups=1, shape=()):
        place = (self.start, self.whole, self.sample)
        return law_twin.keep_indices(self.words, rate, size, groups, shape, *place)

    def normal(self, shape, shared=()):
        return special.ndtri(self.uniform(shape, shared))


@dataclasses.dataclass(frozen=True)
class Row:
    """A function with fixed options. Its strength is the rate, or whatever stands in its place."""

    function: Callable[..., Any]
    call: Callable[..., Any]
    """Of (key, x, strength, **options); returns one array."""
    formula: Callable[[Draw, np.ndarray, Any], np.ndarray]
    """In the dtype of x, which is float32 or wider."""
    shape: tuple[int, ...] = (7, 10)
    other: tuple[int, ...] = (3, 5, 6)
    shared: tuple[int, ...] = ()
    """The axes along which elements are dropped together."""

    strengths: tuple[Any, ...] = RATES
    is_rate: bool = True
    """Whether the strength is a rate, in [0, 1] and with a gradient of zero."""
    traceable: bool = True
    """Whether strength and flag may be traced."""
    zeros: tuple[float, ...] = (0, 0.0, 1e-12)
    """Static strengths that return x itself."""

    evaluated: Callable[[np.ndarray, Any], np.ndarray] | None = None
    """What evaluation returns; None for x itself."""
    pullback: Callable[[Draw, np.ndarray, Any, np.ndarray], np.ndarray] | None = None
    """Of (draw, x, strength, cotangent); None for a formula that is affine in each element."""
    drops: bool = True
    """Whether there are elements whose values, and those of their cotangents, do not count."""
    elementwise: bool = True
    """Whether each element depends on the element of x in its place alone."""

    dtypes: tuple[Any, ...] = SOME
    """All of them only where a function computes in a way of its own."""
    rtol: float = 0.0
    """0 for a formula that the function follows to the last bit."""
    atol: float = 0.0
    rtol_wide: float = 1e-12
    """In float64."""
    stores: int = 0
    """Elements that the backward pass needs besides the key."""
    stores_key: bool = True
    constants: int = 0
    """Elements that are stored besides, if the strength is traced."""
    needs_x: bool = False
    """Whether the gradient with respect to the strength needs x."""

    site: tuple[str, ...] = ()
    """The path of the key below the one that is passed."""
    kind: str = ""
    """In an audit; the function's name if empty."""
    site_shape: tuple[int, ...] | None = None
    """In an audit; None for x's."""
    saves_work: bool = False
    """Whether an audit says that the dropped fraction is not computed."""
    digits: int = 1
    """How many digits it draws by default, for each of which it stores a key of two words."""
    audited_bytes: int | None = None
    """In an audit, what the backward pass stores; None for the keys."""
    key_at_one: bool = False
    """Whether a rate of 1 needs a key, which says what stays."""
    findings: tuple[str, ...] = ()
    examples: bool = True
    """Whether the first axis counts examples, which a mask tells apart."""
    has_blocks: bool | None = None
    """Whether it takes start and global_shape; None to ask its signature."""
    array: str | None = "x"
    """What an error calls x; None where the errors are the function's own."""
    audited_rate: Callable[[Draw], float] = lambda draw: 1 - draw.kept(RATE)
    """The effective rate in an audit."""
    precision: int | None = None
    """The default."""
    programs: int | None = 1
    """Of an eager call; None if it makes no promise."""

    def blocks(self):
        return self.takes("start") if self.has_blocks is None else self.has_blocks

    def takes(self, option):
        return option in inspect.signature(self.function).parameters

    def inputs(self, shape=None, seed=1):
        """Not from `jax.random`, whose normal numbers take longer to compile than a test."""
        shape = self.shape if shape is None else shape
        if self.differentiable:
            return np.random.default_rng(seed).standard_normal(shape, np.float32)
        return np.random.default_rng(seed).integers(0, 9, shape, np.int32)

    @property
    def differentiable(self):
        return jnp.issubdtype(self.dtypes[0], jnp.inexact)

    @property
    def strength(self):
        return RATE if self.is_rate else self.strengths[1]

    def strength_for(self, shape):
        """A strength that is an array of x's shape, for another shape."""
        return np.resize(self.strength, shape) if self.array_strength else self.strength

    @property
    def complex(self):
        """Whether x may be complex."""
        return jnp.complex64 in self.dtypes

    @property
    def array_strength(self):
        return np.shape(self.strength) == self.shape

    def gradient(self, draw, x, strength, cotangent):
        if self.pullback is not None:
            return self.pullback(draw, x, strength, cotangent)
        at_zero = self.formula(draw, np.zeros_like(x), strength)
        return self.formula(draw, cotangent, strength) - at_zero

    def in_evaluation(self, x, strength):
        return x if self.evaluated is None else self.evaluated(x, strength)


def differences(function, *arguments, epsilon=1e-6):
    """Central differences of a scalar function with respect to every element of each argument."""
    gradients = []
    for position, argument in enumerate(arguments):
        gradient = np.zeros(np.shape(argument))
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (epsilon, -epsilon):
                moved = np.array(argument, np.float64)
                moved[index] += step
                values.append(function(*arguments[:position], moved, *arguments[position + 1 :]))
            gradient[index] = (values[0] - values[1]) / (2 * epsilon)
        gradients.append(gradient)
    return gradients


def real(x):
    """A constructor of x's real numbers."""
    return np.real(x[:0]).dtype.type


# --- masks --------------------------------------------------------------------------------


def masked(shared=(), scaled=True):
    def formula(draw, x, rate):
        kept = draw.kept(rate)
        factor = real(x)(1 / kept if kept and scaled else 1)
        return np.where(draw.keep(rate, x.shape, shared), x * factor, 0)

    return formula


def mask_row(function, shape, shared, *, scaled=True, **options):
    row_options = {
        name: options.pop(name)
        for name in ("other", "findings", "dtypes", "examples")
        if name in options
    }
    options |= {} if scaled else {"scale_by_keep": False}
    return Row(
        function=function,
        call=functools.partial(function, **options),
        formula=masked(shared, scaled),
        shape=shape,
        shared=shared,
        array="table" if function is jdropout.embedding_dropout else "x",
        **row_options,
    )


def connected(key, w, rate, **options):
    return jdropout.drop_connect_tree(key, {"a": {"w": w}}, rate, select=["w"], **options)["a"]["w"]


def words_formula(draw, tokens, rate):
    kept = draw.keep(rate, tokens.shape) | np.isin(tokens, PROTECTED)
    return np.where(kept, tokens, UNKNOWN)


def first_patches(key, x, rate, **options):
    return jdropout.patch_dropout(key, x, rate, **options)[0]


def patch_indices(draw, shape, rate=0.5, *, axis=1, num_prefix_tokens=1, ordered=False):
    """The definition: the patches with the smallest of the twin's numbers."""
    axis %= len(shape)
    length = shape[axis] - num_prefix_tokens
    count = max(1, math.floor(round(length * (1 - rate), 6)))
    numbers = draw.uniform((*shape[:axis], length))
    chosen = np.argsort(numbers, axis=-1, kind="stable")[..., :count]
    chosen = np.sort(chosen, axis=-1) if ordered else chosen
    prefix = np.broadcast_to(np.arange(num_prefix_tokens), (*shape[:axis], num_prefix_tokens))
    return np.concatenate([prefix, chosen + num_prefix_tokens], axis=-1)


def take(x, indices, axis=1):
    x, axis = np.asarray(x), axis % np.ndim(x)
    return np.take_along_axis(x, indices.reshape(indices.shape + (1,) * (x.ndim - axis - 1)), axis)


def put_back(x, indices, axis, cotangent):
    """The gradient of `take`, whose indices are all different."""
    x_bar, axis = np.zeros_like(x), axis % np.ndim(x)
    where = indices.reshape(indices.shape + (1,) * (x.ndim - axis - 1))
    np.put_along_axis(x_bar, where, cotangent, axis)
    return x_bar


# --- DropBlock ----------------------------------------------------------------------------


def block_parts(options, shape):
    """Spatial axes with their block sizes, and the channel axis, counted from the front."""
    axes = [axis % len(shape) for axis in options.get("spatial_axes", (1, 2))]
    size = options["block_size"]
    sizes = [size] * len(axes) if isinstance(size, int) else size
    blocks = {axis: min(size, shape[axis]) for axis, size in zip(axes, sizes, strict=True)}
    return blocks, options.get("channel_axis", -1) % len(shape)


def cover(corners, blocks):
    """True where an element lies in no block; block by block, with no window."""
    grown = [
        size + blocks[axis] - 1 if axis in blocks else size
        for axis, size in enumerate(corners.shape)
    ]
    kept = np.ones(grown, bool)
    for corner in np.argwhere(~corners):
        where = (slice(i, i + blocks.get(axis, 1)) for axis, i in enumerate(corner))
        kept[tuple(where)] = False
    return kept


def outside_blocks(draw, options, shape, rate):
    """The mask of DropBlock: True where an element is kept."""
    blocks, channel = block_parts(options, shape)
    corners = [size - blocks.get(axis, 1) + 1 for axis, size in enumerate(shape)]
    corners[channel] = 1 if options.get("shared_channels", True) else corners[channel]
    gamma = jdropout.drop_block_gamma(rate, [shape[a] for a in blocks], list(blocks.values()))
    return np.broadcast_to(cover(draw.keep(gamma, tuple(corners)), blocks), shape)


def block_row(**options):
    def formula(draw, x, rate):
        kept = outside_blocks(draw, options, x.shape, rate)
        fraction = kept.mean() if options.get("scale") == "realised" else 1 - rate
        factor = 1 / fraction if fraction else 1
        return np.where(kept, x * real(x)(factor), 0)

    shared = options.get("shared_channels", True)
    return Row(
        digits=2,
        function=jdropout.drop_block,
        call=functools.partial(jdropout.drop_block, **options),
        formula=formula,
        shape=(2, 7, 9, 4),
        other=(3, 6, 5, 2),
        shared=(3,) if shared else (),
        rtol=3e-6,
        rtol_wide=1e-8,  # gamma is rounded to 32 bits
        constants=2 * 6,  # how many blocks can cover an element, and how often that is so
        audited_rate=lambda draw: RATE,
        precision=32,
    )


# --- noise --------------------------------------------------------------------------------


def gaussian_formula(draw, x, rate):
    return x * (1 + np.sqrt(rate / (1 - rate)) * draw.normal(x.shape)).astype(real(x))


def normal_formula(draw, x, stddev):
    return x + (stddev * draw.normal(x.shape)).astype(real(x))


def uniform_formula(draw, x, amplitude):
    return x + (amplitude * (2 * draw.uniform(x.shape) - 1)).astype(real(x))


def alpha_formula(shared=()):
    """As Klambauer et al. have it, with the effective rate."""

    def formula(draw, x, rate):
        q = draw.kept(rate)
        if q == 0:
            return np.zeros_like(x)
        a = (q + SELU_FLOOR**2 * q * (1 - q)) ** -0.5
        y = np.where(draw.keep(rate, x.shape, shared), x, real(x)(SELU_FLOOR))
        return real(x)(a) * y - real(x)(a * (1 - q) * SELU_FLOOR)

    return formula


NOISE = dict(dtypes=(jnp.bfloat16,), rtol=3e-6, atol=3e-6, stores=1)
AMOUNT = dict(
    NOISE,
    is_rate=False,
    strengths=(0.25, 0.7, 1.5),
    zeros=(0, 0.0),
    drops=False,
    stores_key=False,  # added noise has no part in the gradient of x
)


# --- learned dropout ----------------------------------------------------------------------

LEARNED = dict(
    other=(4, 10),
    dtypes=(jnp.bfloat16,),
    is_rate=False,
    zeros=(),
    drops=False,
    rtol=1e-4,
    atol=1e-5,
    rtol_wide=1e-9,
)
LOGITS = np.random.default_rng(2).standard_normal((1, 10), np.float32)
PREACTIVATION = np.random.default_rng(3).standard_normal((7, 10), np.float32)
LOG_ALPHA = 3 * np.random.default_rng(4).standard_normal((10, 6), np.float32)
WEIGHT = np.random.default_rng(5).standard_normal((10, 6), np.float32)
BIAS = np.arange(6, dtype=np.float32)


def scaled_by(parameter):
    return tuple(np.float32(factor) * parameter for factor in (0.5, 1, -1))


def concrete_formula(draw, x, logit):
    """As Gal et al. have it."""
    p, u = special.expit(logit.astype(np.float64)), draw.uniform(x.shape)
    argument = (np.log(p) - np.log(1 - p) + np.log(u) - np.log(1 - u)) / 0.1
    return x * ((1 - special.expit(argument)) / (1 - p)).astype(real(x))


def variational_formula(draw, x, log_alpha):
    deviation = np.exp(np.clip(log_alpha.astype(np.float64), -8, 8) / 2)
    return x * (1 + deviation * draw.normal(x.shape)).astype(real(x))


def pruned(x, log_alpha):
    return np.where(log_alpha > 3, 0, x)


def dense(key, x, log_alpha, **options):
    weight, bias = jnp.asarray(WEIGHT, x.dtype), jnp.asarray(BIAS, x.dtype)
    return jdropout.variational_dense(key, x, weight, log_alpha, bias, **options)


def dense_parts(draw, x, log_alpha):
    x, weight = np.asarray(x, np.float64), np.asarray(WEIGHT, np.float64)
    alpha = np.exp(np.clip(np.asarray(log_alpha, np.float64), -8, 8))
    variances = alpha * weight**2
    return x, weight, variances, np.sqrt(x**2 @ variances), draw.normal((*x.shape[:-1], 6))


def dense_formula(draw, x, log_alpha):
    x, weight, _, deviation, z = dense_parts(draw, x, log_alpha)
    return x @ weight + BIAS + deviation * z


def dense_pullback(draw, x, log_alpha, cotangent):
    x, weight, variances, deviation, z = dense_parts(draw, x, log_alpha)
    return cotangent @ weight.T + (cotangent * z / deviation) @ variances.T * x


def dense_evaluated(x, log_alpha):
    return x @ np.where(log_alpha > 3, 0, WEIGHT) + BIAS


def standout_formula(draw, x, preactivation):
    return np.where(draw.uniform(x.shape) < special.expit(np.float64(preactivation)), x, 0)


def standout_evaluated(x, preactivation):
    return x * special.expit(np.float64(preactivation)).astype(real(x))


# --- weights, states and layers -----------------------------------------------------------


def candidates(w, fraction, unit_axis=None, output_axis=-1):
    """The weights that targeted dropout may drop, by sorting unit after unit."""
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


def untargeted(draw, w, rate):
    """True where a weight stays: it is not a candidate, or the mask keeps it."""
    return draw.keep(rate, w.shape) | ~candidates(w, 0.5)


def old_state(x):
    return np.random.default_rng(6).standard_normal(np.shape(x), np.float32)


def zoned_out(key, x, rate, **options):
    return jdropout.zoneout(key, jnp.asarray(old_state(x)).astype(x.dtype), x, rate, **options)


def zoneout_formula(draw, x, rate):
    return np.where(draw.keep(rate, x.shape), x, old_state(x).astype(x.dtype))


def zoneout_expectation(x, rate):
    kept = Draw(jax.random.key(0), precision=16).kept(rate)
    return ((1 - kept) * old_state(x) + kept * x).astype(x.dtype)


def residual_layer(x):
    return x + jnp.sin(x)


def layer_formula(draw, x, rate):
    with np.errstate(invalid="ignore"):
        return np.where(draw.keep(rate, ()), x + np.sin(x), x)


def layer_pullback(draw, x, rate, y_bar):
    with np.errstate(invalid="ignore"):
        return np.where(draw.keep(rate, ()), y_bar * (1 + np.cos(x)), y_bar)


def beside(x):
    """The bias and the residual of an input."""
    return np.linspace(0.5, 2, x.shape[-1], dtype=np.float32), old_state(x)


def bias_added(key, x, rate, **options):
    bias, residual = (jnp.asarray(array).astype(x.dtype) for array in beside(x))
    return jdropout.bias_dropout_add(key, x, bias, residual, rate, **options)


def bias_formula(draw, x, rate):
    bias, residual = (array.astype(x.dtype) for array in beside(x))
    return residual + masked()(draw, x + bias, rate)


def bias_evaluated(x, rate):
    bias, residual = beside(x)
    return residual + (x + bias)


def normalised(x):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)


def added_and_normalised(key, x, rate, **options):
    residual = jnp.asarray(old_state(x)).astype(x.dtype)
    return jdropout.dropout_add_norm(key, x, residual, rate, **options)[0]


def norm_formula(draw, x, rate):
    return normalised(old_state(x) + masked()(draw, x, rate))


def norm_pullback(draw, x, rate, y_bar):
    total = np.asarray(old_state(x) + masked()(draw, x, rate), np.float64)
    y, n = normalised(total), total.shape[-1]
    deviation = np.sqrt(total.var(-1, keepdims=True) + 1e-6)
    mean, along = y_bar.mean(-1, keepdims=True), (y_bar * y).sum(-1, keepdims=True) / n
    return masked()(draw, (y_bar - mean - y * along) / deviation, rate)


BESIDE = dict(
    zeros=(),
    dtypes=(jnp.float64,),
    rtol=2e-6,
    atol=2e-6,
    kind="dropout",
    array=None,
    programs=None,
    has_blocks=False,  # of three arrays; their own tests have them
)


# --- subsets ------------------------------------------------------------------------------

UNITS = np.random.default_rng(7).standard_normal((3, 10), np.float32)
FACTORS = np.random.default_rng(8).standard_normal((4, 1, 10), np.float32)


@np.errstate(invalid="ignore")
def depth_formula(draw, x, rate):
    y, kept = x.copy(), draw.subset(rate, len(x))
    y[kept] += np.sin(x[kept]) * real(x)(len(x) / len(kept))
    return y


@np.errstate(invalid="ignore")
def depth_pullback(draw, x, rate, y_bar):
    x_bar, kept = y_bar.copy(), draw.subset(rate, len(x))
    x_bar[kept] *= 1 + np.cos(x[kept]) * real(x)(len(x) / len(kept))
    return x_bar


def routed(key, x, rate, **options):
    return jdropout.route_tokens(key, lambda x, where: residual_layer(x), x, rate, **options)


@np.errstate(invalid="ignore")
def route_formula(draw, x, rate):
    y, kept = x.copy(), draw.subset(rate, x.shape[1], shape=x.shape[:1])
    tokens = take(x, kept)
    np.put_along_axis(y, kept[..., None], tokens + np.sin(tokens), 1)
    return y


@np.errstate(invalid="ignore")
def route_pullback(draw, x, rate, y_bar):
    kept = draw.subset(rate, x.shape[1], shape=x.shape[:1])
    return y_bar + put_back(x, kept, 1, take(y_bar, kept) * np.cos(take(x, kept)))


def some_units(key, x, rate, **options):
    """Three examples, ten units whose values are given, and their outgoing weights x."""
    return jdropout.unit_subset(
        key, lambda units, x, _: units.astype(x.dtype) @ x, UNITS, x, (), rate, **options
    )


def unit_formula(draw, x, rate):
    kept = draw.subset(rate, len(x), shape=(1,))[0]
    return UNITS[:, kept] @ x[kept] * real(x)(len(x) / len(kept))


def unit_pullback(draw, x, rate, y_bar):
    x_bar, kept = np.zeros_like(x), draw.subset(rate, len(x), shape=(1,))[0]
    x_bar[kept] = UNITS[:, kept].T @ y_bar * real(x)(len(x) / len(kept))
    return x_bar


def some_layers(key, x, rate, **options):
    def layer(factor, x):
        return x + jnp.sin(x * factor.astype(x.dtype))

    return jdropout.layer_subset(key, layer, FACTORS, x, rate, **options)


@np.errstate(invalid="ignore")
def layers_formula(draw, x, rate):
    for index in draw.subset(rate, len(FACTORS)):
        x = x + np.sin(x * FACTORS[index])
    return x


@np.errstate(invalid="ignore")
def layers_pullback(draw, x, rate, y_bar):
    for index in draw.subset(rate, len(FACTORS)):
        y_bar = y_bar * (1 + FACTORS[index] * np.cos(x * FACTORS[index]))
        x = x + np.sin(x * FACTORS[index])
    return y_bar


def everything(formula):
    """The formula in evaluation."""
    return lambda x, rate: formula(Draw(jax.random.key(0)), x, 0)


SUBSET = dict(
    traceable=False,
    zeros=(),
    drops=False,
    dtypes=(jnp.float64,),
    rtol=2e-6,
    atol=2e-6,
    array=None,
    stores_key=False,
    has_blocks=False,  # of the axes that are chosen from; their own tests have them
    saves_work=True,
    key_at_one=True,
    programs=None,
)


# --- the table ----------------------------------------------------------------------------

ROWS = {
    "dropout": mask_row(jdropout.dropout, (7, 10), (), dtypes=INEXACT),
    "spatial": mask_row(
        jdropout.spatial_dropout, (4, 6, 3, 5), (2, 3), channel_axis=1, other=(3, 5, 2, 4)
    ),
    "locked": mask_row(jdropout.locked_dropout, (6, 3, 8), (1,)),
    "drop_path": mask_row(jdropout.drop_path, (13, 2, 3), (1, 2), other=(9, 2, 2)),
    "drop_path, batch": mask_row(
        jdropout.drop_path,
        (4, 5),
        (0, 1),
        mode="batch",
        other=(3, 6),
        examples=False,
        findings=("shared-over-batch",),
    ),
    "drop_path, unscaled": mask_row(
        jdropout.drop_path, (13, 2, 3), (1, 2), scaled=False, other=(9, 2, 2)
    ),
    "embedding": mask_row(jdropout.embedding_dropout, (23, 4), (1,), other=(9, 5), examples=False),
    "drop_block": block_row(block_size=3),
    "drop_block, realised": block_row(block_size=(2, 3), scale="realised", shared_channels=False),
    "word_dropout": Row(
        function=jdropout.word_dropout,
        call=functools.partial(jdropout.word_dropout, replacement=UNKNOWN, protected=PROTECTED),
        formula=words_formula,
        dtypes=INTEGERS,
        array=None,
    ),
    "patch_dropout": Row(
        digits=2,
        function=jdropout.patch_dropout,
        call=first_patches,
        formula=lambda draw, x, rate: take(x, patch_indices(draw, x.shape, rate)),
        pullback=lambda draw, x, rate, y_bar: put_back(
            x, patch_indices(draw, x.shape, rate), 1, y_bar
        ),
        shape=(3, 9, 4),
        other=(2, 8, 3),
        traceable=False,
        zeros=(0, 0.0, 1e-9),
        elementwise=False,
        dtypes=(*INEXACT, jnp.int32, jnp.bool_),
        site_shape=(3, 8),
        audited_rate=lambda draw: 1 - 5 / 8,
        saves_work=True,
        key_at_one=True,
        array=None,
    ),
    "stochastic_depth": Row(
        function=jdropout.stochastic_depth,
        call=lambda key, x, rate, **options: jdropout.stochastic_depth(
            key, jnp.sin, x, rate, **options
        ),
        formula=depth_formula,
        pullback=depth_pullback,
        evaluated=everything(depth_formula),
        site_shape=(7,),
        audited_rate=lambda draw: 1 - 5 / 7,
        audited_bytes=8 * 7,
        stores=2 * 7 + 50 + 2,  # the order, the cosines, and constants
        **SUBSET,
    ),
    "route_tokens": Row(
        function=jdropout.route_tokens,
        call=routed,
        formula=route_formula,
        pullback=route_pullback,
        evaluated=everything(route_formula),
        shape=(3, 9, 4),
        other=(2, 8, 3),
        site_shape=(3, 9),
        audited_rate=lambda draw: 1 - 6 / 9,
        audited_bytes=8 * 3 * 9,
        stores=2 * 27 + 72,  # the order and the cosines
        **SUBSET,
    ),
    "unit_subset": Row(
        function=jdropout.unit_subset,
        call=some_units,
        formula=unit_formula,
        pullback=unit_pullback,
        evaluated=everything(unit_formula),
        shape=(10, 5),
        elementwise=False,
        site_shape=(1, 10),
        audited_rate=lambda draw: 1 - 7 / 10,
        audited_bytes=8 * 10,
        stores=2 * 10 + 21 + 1,  # the order, the kept units and the factor
        **SUBSET,
    ),
    "layer_subset": Row(
        function=jdropout.layer_subset,
        call=some_layers,
        formula=layers_formula,
        pullback=layers_pullback,
        evaluated=everything(layers_formula),
        site_shape=(4,),
        audited_rate=lambda draw: 1 - 3 / 4,
        audited_bytes=8 * 4,
        stores=3 * (70 + 10),  # the cosines and the factors
        **SUBSET,
    ),
    "gaussian_dropout": Row(
        digits=2,
        function=jdropout.gaussian_dropout,
        call=jdropout.gaussian_dropout,
        formula=gaussian_formula,
        audited_rate=lambda draw: RATE,
        **NOISE
        | dict(zeros=(0, 0.0), drops=False, dtypes=(jnp.bfloat16, jnp.float8_e4m3fn, jnp.float64)),
    ),
    "gaussian_noise": Row(
        digits=2,
        function=jdropout.gaussian_noise,
        call=jdropout.gaussian_noise,
        formula=normal_formula,
        **AMOUNT,
    ),
    "uniform_noise": Row(
        digits=2,
        function=jdropout.uniform_noise,
        call=jdropout.uniform_noise,
        formula=uniform_formula,
        **AMOUNT,
    ),
    "alpha_dropout": Row(
        function=jdropout.alpha_dropout,
        call=jdropout.alpha_dropout,
        formula=alpha_formula(),
        **NOISE | dict(stores=0, dtypes=(jnp.float16, jnp.float8_e4m3fn, jnp.float64)),
    ),
    "feature_alpha_dropout": Row(
        function=jdropout.feature_alpha_dropout,
        call=jdropout.feature_alpha_dropout,
        formula=alpha_formula((1,)),
        shape=(6, 3, 8),
        shared=(1,),
        kind="alpha_dropout",
        **NOISE | dict(stores=0),
    ),
    "drop_connect": Row(
        function=jdropout.drop_connect,
        call=jdropout.drop_connect,
        examples=False,
        formula=masked(),
        array="w",
    ),
    "drop_connect_tree": Row(
        function=jdropout.drop_connect_tree,
        call=connected,
        examples=False,
        formula=masked(),
        site=("a", "w"),
        kind="drop_connect",
        array=None,
    ),
    "targeted_dropout": Row(
        function=jdropout.targeted_dropout,
        call=functools.partial(jdropout.targeted_dropout, target_fraction=0.5),
        examples=False,
        formula=lambda draw, w, rate: np.where(untargeted(draw, w, rate), w, 0),
        pullback=lambda draw, w, rate, w_bar: np.where(untargeted(draw, w, rate), w_bar, 0),
        dtypes=(jnp.bfloat16, jnp.float64, jnp.complex64),
        stores=70,  # the weights, which are there anyway
        array="w",
    ),
    "zoneout": Row(
        function=jdropout.zoneout,
        call=zoned_out,
        formula=zoneout_formula,
        evaluated=zoneout_expectation,
        rtol=2e-6,
        atol=2e-6,
        array=None,
    ),
    "layer_drop": Row(
        function=jdropout.layer_drop,
        call=lambda key, x, rate, **options: jdropout.layer_drop(
            key, residual_layer, x, rate, **options
        ),
        formula=layer_formula,
        pullback=layer_pullback,
        evaluated=lambda x, rate: x + np.sin(x),
        zeros=(),
        drops=False,
        dtypes=(jnp.bfloat16, jnp.float64),
        rtol=2e-6,
        atol=2e-6,
        stores_key=False,
        stores=70 + 2,  # the cosine of the layer, and the decision
        constants=70 + 2,  # a traced rate may be invalid: then the layer's result is replaced
        site_shape=(),
        saves_work=True,
        array=None,
        programs=None,
    ),
    "concrete_dropout": Row(
        digits=2,
        function=jdropout.concrete_dropout,
        call=jdropout.concrete_dropout,
        formula=concrete_formula,
        strengths=scaled_by(LOGITS),
        needs_x=True,
        stores=LOGITS.size + 1,  # and the temperature
        **LEARNED,
    ),
    "variational_dropout": Row(
        digits=2,
        function=jdropout.variational_dropout,
        call=jdropout.variational_dropout,
        formula=variational_formula,
        evaluated=pruned,
        strengths=scaled_by(3 * LOGITS),
        needs_x=True,
        stores=LOGITS.size + 1,  # and the threshold
        **LEARNED,
    ),
    "variational_dense": Row(
        digits=2,
        function=jdropout.variational_dense,
        call=dense,
        formula=dense_formula,
        pullback=dense_pullback,
        evaluated=dense_evaluated,
        strengths=scaled_by(LOG_ALPHA),
        elementwise=False,
        programs=None,
        array=None,
        site_shape=(7, 6),
        stores=70 + 2 * 60 + 2 * 42,  # the arguments and the variances
        **LEARNED | dict(dtypes=(jnp.float16, jnp.bfloat16)),
    ),
    "standout": Row(
        digits=2,
        function=jdropout.standout,
        call=jdropout.standout,
        formula=standout_formula,
        evaluated=standout_evaluated,
        strengths=scaled_by(PREACTIVATION),
        stores=PREACTIVATION.size + 2,  # and the slope and offset
        **LEARNED | dict(drops=True, dtypes=NARROW),
    ),
    "bias_dropout_add": Row(
        function=jdropout.bias_dropout_add,
        call=bias_added,
        formula=bias_formula,
        evaluated=bias_evaluated,
        **BESIDE,
    ),
    "dropout_add_norm": Row(
        function=jdropout.dropout_add_norm,
        call=added_and_normalised,
        formula=norm_formula,
        pullback=norm_pullback,
        evaluated=lambda x, rate: normalised(old_state(x) + x),
        elementwise=False,
        stores=70,  # the sum
        **BESIDE | dict(rtol=1e-4, atol=1e-5),
    ),
}
