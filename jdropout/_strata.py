"""The strata law, version 1: the masks of several samples, coupled at every position.

At each position, the samples divide the unit interval among themselves: each has its own stratum,
in an order that is random and independent for every position. So a unit is dropped in its share of
the samples, while the mask of each sample alone has the distribution of the mask law. The text of
the law is in `docs/law.md`; changing one bit requires a new version.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _law
from jdropout._threefry import threefry2x32
from jdropout._threshold import DIGIT_BITS, Threshold, below

LARGEST_SIZE = 250
"""Most samples of a group: products of two numbers below the next prime have 16 bits."""

_DIGIT = np.uint32(DIGIT_BITS)


def keep(
    mask_key_words: jax.Array,
    threshold: Threshold,
    layout: _law.Layout,
    origin: _law.Origin | None,
    *,
    sample: jax.Array,
    size: int,
) -> jax.Array:
    """The mask of a block, as `_law.keep`, in one sample.

    Args:
      mask_key_words: words of the mask keys of the threshold's digits, and of the order's.
      threshold: threshold of the rate.
      layout: layout of the block.
      origin: origin of the block.
      sample: number of the sample, a uint32 scalar.
      size: number of samples.
    """
    return below(threshold, _digits(mask_key_words, layout, origin, sample, size))


def uniform(
    mask_key_words: jax.Array,
    layout: _law.Layout,
    origin: _law.Origin | None,
    *,
    sample: jax.Array,
    size: int,
) -> jax.Array:
    """The uniform numbers of a block, as `_law.uniform`, in one sample."""
    high, low = _digits(mask_key_words, layout, origin, sample, size)
    return (high << _DIGIT) | low


def _digits(
    words: jax.Array,
    layout: _law.Layout,
    origin: _law.Origin | None,
    sample: jax.Array,
    size: int,
) -> list[jax.Array]:
    """The digits of the uniform numbers: the samples share all but a shift of the first."""
    numbers = _numbers(words, layout, origin)
    shift = (_order(numbers[-1], sample, size) * np.uint32(_reciprocal(size))) >> _DIGIT
    first = (numbers[0] + shift) & np.uint32(2**DIGIT_BITS - 1)
    return [first, *numbers[1:-1]]


def _order(number: jax.Array, sample: jax.Array, size: int) -> jax.Array:
    """The stratum of a sample: its rank among ``a, 2 a, ..., size a`` modulo a prime above size.

    Which multiples of `a` are smaller is told by those that are not there: those of the numbers
    from size + 1 up to the prime.

    Args:
      number: 16 random bits for every position, which become the factor `a`.
      sample: number of the sample.
      size: number of samples.
    """
    prime = _prime_above(size)
    factor = np.uint32(1) + ((number * np.uint32(prime - 1)) >> _DIGIT)

    def fraction(multiple: jax.Array | np.uint32) -> jax.Array:
        """A multiple of `a` modulo the prime, over the prime, in units of 2^-32."""
        return factor * (multiple * np.uint32(_reciprocal(prime)))

    own = fraction(sample + np.uint32(1))
    order = (((own >> _DIGIT) + np.uint32(1)) * np.uint32(prime)) >> _DIGIT
    missing = np.arange(size + 1, prime, dtype=np.uint32)
    smaller = sum((fraction(each) < own).astype(jnp.uint32) for each in missing)
    return order - (smaller + np.uint32(1))


def _numbers(words: jax.Array, layout: _law.Layout, origin: _law.Origin | None) -> list[jax.Array]:
    """The 16 bits of every element of a block under each key; every cipher block is hashed once."""
    *lead, rows, columns = layout.shape
    lanes = _law.GROUP_ROWS
    before = lanes - 1 if layout.phase is None else layout.phase
    groups = -(-(rows + before) // lanes)
    group = lax.broadcasted_iota(jnp.uint32, (*lead, groups, 1), len(lead))
    index = _law.block_index(layout, origin, group)
    # A loop, because XLA fuses no cipher of a loop into what uses it, and evaluates it once for all
    # samples of a vmap.
    blocks = lax.map(
        lambda key: jnp.stack(threefry2x32((key[0], key[1]), index)), words.reshape(-1, 2)
    )

    def of_rows(block: jax.Array) -> jax.Array:
        lane = lax.broadcasted_iota(jnp.uint32, (*lead, groups, lanes, columns), len(lead) + 1)
        word = jnp.where(lane < 2, block[0][..., None, :], block[1][..., None, :])
        number = (word >> (lane % 2 * _DIGIT)) & np.uint32(2**DIGIT_BITS - 1)
        number = number.reshape(*lead, groups * lanes, columns)
        phase = _law.phase(layout, origin)
        if layout.phase is None:
            return lax.dynamic_slice_in_dim(number, phase, rows, axis=len(lead))
        return lax.slice_in_dim(number, layout.phase, layout.phase + rows, axis=len(lead))

    return [of_rows(block) for block in blocks]


def _reciprocal(number: int) -> int:
    """``1 / number`` in units of 2^-32, rounded up; 0 for 1, whose multiples are whole."""
    return -(-(2**32) // number) % 2**32


@functools.cache
def _prime_above(number: int) -> int:
    number += 1
    while any(number % factor == 0 for factor in range(2, number)):
        number += 1
    return number
