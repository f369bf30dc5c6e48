"""Dropout of tokens: replaces words, or removes patches."""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jdropout import _arrays, _checks, _values
from jdropout._arrays import as_array
from jdropout._draw import Draw, Outcome
from jdropout._new_draw import UNIFORM, new_draw
from jdropout._subset import _rows
from jdropout._subset._indices import Order, check_fixed_rate, kept_first
from jdropout._subset._route_tokens import check_prefix, with_prefix
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate
from jdropout._values import as_integer, check_indexable, type_name


def word_dropout(
    key: Key | None,
    tokens: ArrayLike,
    rate: Rate,
    *,
    replacement: int,
    protected: Sequence[int] = (),
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Replaces tokens at random, for example by the token of an unknown word.

    Each unprotected token is replaced with probability ``effective_rate(rate)``, independently
    of the others. Nothing is scaled: tokens are indices, not quantities.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      tokens: integer array of any shape.
      rate: probability of replacing a token, in [0, 1]; a number or a (traced) floating-point
        scalar. A traced rate outside [0, 1] replaces every unprotected token, since integers
        have no NaN.
      replacement: token to insert.
      protected: tokens that are never replaced, such as padding or the start of a sentence.
      deterministic: if True, return `tokens` unchanged; a bool or a (traced) boolean scalar.
      start: index of tokens' first element within an array of `global_shape`, for code that
        sees one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array with the shape and dtype of `tokens`; `tokens` itself if `deterministic` is True
      or a static rate rounds to 0.

    Raises:
      TypeError: if `tokens` are not integers, or another argument has the wrong type, such as a
        boolean rate.
      ValueError: if a token does not fit the dtype, the rate is not a scalar in [0, 1], the key
        is missing or a batch of keys, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> tokens = jnp.array([1, 7, 9, 8, 7, 5, 0, 0])
      >>> jdropout.word_dropout(
      ...     jax.random.key(0), tokens, 0.5, replacement=3, protected=(0, 1)
      ... )
      Array([1, 7, 9, 8, 7, 5, 0, 0], dtype=int32)

    References:
      Iyyer, Manjunatha, Boyd-Graber and Daumé, "Deep unordered composition rivals syntactic
      methods for text classification" (ACL 2015), section 4.1; Bowman et al., "Generating
      sentences from a continuous space" (CoNLL 2016), section 3.1.
    """
    array = _check_tokens(tokens, replacement, protected)
    draw = new_draw(
        "word_dropout",
        key,
        rate,
        deterministic,
        array.shape,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    if draw.outcome is Outcome.KEPT:
        return cast("jax.Array", draw.result(tokens))  # the object itself, maybe NumPy's
    value = np.asarray(replacement, array.dtype)
    spared = np.array(list(protected), array.dtype)
    return cast("jax.Array", draw.apply(_replaced, array, value, spared, dropped=_replaced))


def _replaced(
    draw: Draw, tokens: jax.Array, replacement: jax.Array, protected: jax.Array
) -> jax.Array:
    kept = draw.keep_like(tokens)
    valid = draw.valid()
    if valid is not None:  # integers have no NaN
        kept &= valid
    if protected.size:
        alternatives = protected.reshape((1,) * tokens.ndim + (-1,))
        kept |= (tokens[..., None] == alternatives).any(axis=-1)
    return jnp.where(kept, tokens, replacement)


def patch_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: float,
    *,
    axis: int = 1,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    deterministic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Removes a fixed number of tokens, so that a vision transformer has less to compute.

    Of the L tokens after the prefix, ``L * (1 - rate)`` are kept, rounded down but at least
    one: for each example independently, those with the smallest uniform numbers of the mask
    law. All subsets are equally likely. Nothing is scaled. Shapes are static, so neither rate
    nor flag may be traced.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if all tokens are
        kept (``deterministic=True``, or a rate too low to remove one).
      x: array such as (batch, tokens, features), of any dtype.
      rate: fraction of tokens to remove, a number in [0, 1].
      axis: axis of the tokens. The axes before it count examples.
      num_prefix_tokens: number of leading tokens that are always kept, such as a class token.
      ordered: if True, kept tokens stay in their original order; otherwise their order is
        random.
      deterministic: if True, keep all tokens and return `x` unchanged.

    Returns:
      An array of x's dtype with fewer tokens, and the indices of these tokens in `x`, int32 of
      shape ``x.shape[:axis] + (kept,)``, prefix included.

    Raises:
      TypeError: if the rate or flag is traced, or another argument has the wrong type.
      ValueError: if the prefix leaves no tokens, the axis does not exist, the rate is outside
        [0, 1], or the key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x = jnp.arange(8.0).reshape(1, 8, 1)
      >>> y, indices = jdropout.patch_dropout(jax.random.key(0), x, 0.5, ordered=True)
      >>> indices
      Array([[0, 2, 4, 6]], dtype=int32)
      >>> y.shape
      (1, 4, 1)

    References:
      Liu, Matsoukas, Strand, Azizpour and Smith, "PatchDropout: economizing vision transformers
      using patch dropout" (WACV 2023), section 3.
    """
    array = _arrays.as_array("x", x)
    rate = check_fixed_rate(rate)
    flag = _checks.check_static_flag(deterministic)
    ordered = _values.check_flag("ordered", ordered)
    token_axis = _values.check_axis("axis", axis, array.ndim)
    length = array.shape[token_axis]
    check_indexable("x", length)
    prefix = check_prefix(num_prefix_tokens, length)
    lead = array.shape[:token_axis]
    # In floating point 100 * (1 - 0.9) is below 10.
    count = max(1, math.floor(round((length - prefix) * (1 - rate), 6)))
    draw = new_draw(
        "patch_dropout",
        key,
        UNIFORM,
        flag,
        (*lead, length - prefix),
        off=count == length - prefix,
        reported_rate=rate,
        batch_axis=0 if lead else None,
        kept_fraction=count / (length - prefix),
        saves_work=True,
    )
    if draw.outcome is Outcome.KEPT:
        everything = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (*lead, length))
        return cast("jax.Array", draw.result(x)), everything
    chosen = draw.apply(
        _gathered, array, axis=token_axis, prefix=prefix, count=count, ordered=ordered
    )
    return cast("tuple[jax.Array, jax.Array]", chosen)


def _gathered(
    draw: Draw, x: jax.Array, *, axis: int, prefix: int, count: int, ordered: bool
) -> tuple[jax.Array, jax.Array]:
    def gathered(draw: Draw, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = kept_first(draw.uniform()[..., None, :], count, ordered)
        order = with_prefix(Order.of(group), prefix)
        kept = _rows.take(x, order, prefix + count, axis)
        return kept, order.rows[..., 0, : prefix + count]

    sharding = jax.typeof(x).sharding
    explicit = sharding.mesh.explicit_axes
    if explicit:
        lead, trail = sharding.spec[:axis], sharding.spec[axis + 1 :]
        specs = (PartitionSpec(*lead, None, *trail), PartitionSpec(*lead, None))
        gathered = jax.sharding.auto_axes(gathered, axes=explicit, out_sharding=specs)
    return gathered(draw, x)


def _check_tokens(tokens: Any, replacement: Any, protected: Any) -> jax.Array:
    array = as_array("tokens", tokens)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"tokens must be an array of integers, got dtype {array.dtype}. Drop words before the "
            "embedding, or use jdropout.dropout after it."
        )
    collection = isinstance(protected, Sequence | frozenset | set | range)
    if not collection or isinstance(protected, str | bytes):
        raise TypeError(
            f"protected must be a sequence of tokens, got {protected!r}. Write (token,) for one."
        )
    limits = jnp.iinfo(array.dtype)
    for name, token in [("replacement", replacement), *(("protected", t) for t in protected)]:
        number = as_integer(token)
        if number is None:
            raise TypeError(
                f"{name} must be an integer, got {token!r} of type {type_name(token)}."
                " Pass the index of a token."
            )
        if not limits.min <= number <= limits.max:
            raise ValueError(
                f"{name} {number} does not fit the tokens' dtype {array.dtype}."
                " Convert tokens to a wider dtype, such as jnp.int32."
            )
    return array
