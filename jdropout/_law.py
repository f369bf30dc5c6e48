"""The mask law, version 1: a dropout mask as a pure function of (key, position).

Read from the top: `keep` is the law; `_elementwise` is its reference evaluation and
`_packed` its fast one. They agree bit for bit. The text of the law is in `docs/law.md`;
changing one bit requires a new `LAW_VERSION`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout._threefry import threefry2x32
from jdropout._threshold import DIGIT_BITS, Threshold, below
from jdropout._typing import Index, Key, WordPair

LAW_VERSION = 1

# The cipher's description: one 64-bit block serves a group of four rows, 16 bits each.
_LANES = 64 // DIGIT_BITS
_DIGIT_MASK = np.uint32((1 << DIGIT_BITS) - 1)
MASK_TAG = 0x6A64726F  # "jdro": the high word of counters that only mask keys use
_ORDER = 2
"""Takes the place of the number of a digit, 0 or 1, in the counter of the order of samples."""

# Two groups, eight rows, fill a byte of a packed mask.
_GROUPS_PER_BYTE = 2

GROUP_ROWS = _LANES
"""Rows of a group, which share a cipher block."""

TILE_ROWS = 8 * _LANES
"""Rows of a TPU's tile of eight groups."""


class Layout(NamedTuple):
    """Where a block of mask lies in the counter space; static."""

    shape: tuple[int, ...]
    """Canonical shape of the block: leading axes, rows, columns."""
    strides: tuple[int, ...]
    """Cipher blocks from one index to the next along every axis (for rows: from group to group)."""
    phase: int | None
    """Lane of the first row; None if it is traced."""
    wide: bool
    """Whether block indices of the whole mask need more than 32 bits."""


class Origin(NamedTuple):
    """Index of the cipher block, and lane, of a mask block's first element."""

    high: jax.Array
    low: jax.Array
    phase: jax.Array | None


# --- positions ----------------------------------------------------------------------------


def locate(
    mask_shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    start: tuple[Index, ...] | None,
    tile: tuple[Index, ...] | None = None,
) -> tuple[Layout, Origin | None]:
    """Finds the block of ``block_shape`` at ``start + tile * block_shape`` in a mask.

    Args:
      mask_shape: shape of the whole mask; broadcast axes have size 1.
      block_shape: shape of the wanted block, of the same rank.
      start: index of the block's first element; None for the beginning.
      tile: how many blocks to move on from ``start`` along every axis; None for 0. If a block has
        whole groups of rows, a traced number leaves the phase static.

    Returns:
      The static layout, and the block's origin (None for the beginning).
    """
    axes = [axis for axis, size in enumerate(mask_shape) if size != 1]
    whole = [mask_shape[axis] for axis in axes]
    block = [block_shape[axis] for axis in axes]
    first: list[Index] = [0 if start is None else start[axis] for axis in axes]
    tiles: list[Index] = [0 if tile is None else tile[axis] for axis in axes]
    if not axes:
        whole, block, first, tiles = [1], [1], [0], [0]
    if len(whole) == 1:
        whole, block, first, tiles = [*whole, 1], [*block, 1], [*first, 0], [*tiles, 0]

    *lead, rows, columns = whole
    counted = [*lead, -(-rows // _LANES), columns]
    strides = tuple(math.prod(counted[axis + 1 :]) for axis in range(len(counted)))
    wide = math.prod(counted) > 2**32

    if start is None and tile is None:
        return Layout(tuple(block), strides, 0, wide), None
    groups_per_tile, ragged_rows = divmod(block[-2], _LANES)
    if ragged_rows:
        first[-2], tiles[-2] = first[-2] + tiles[-2] * block[-2], 0
    row = first[-2]
    if isinstance(row, jax.Array):
        phase = None
        traced_phase = row.astype(jnp.uint32) % np.uint32(_LANES)
        first[-2] = lax.div(row, lax.full_like(row, _LANES))
    else:
        phase, traced_phase = int(row) % _LANES, None
        first[-2] = int(row) // _LANES
    steps = [*block[:-2], groups_per_tile, block[-1]]
    first = [index + number * step for index, number, step in zip(first, tiles, steps, strict=True)]
    static = sum(
        int(index) * stride
        for index, stride in zip(first, strides, strict=True)
        if not isinstance(index, jax.Array)
    )
    # NumPy scalars: making jnp ones would dispatch an operation each in an eager call.
    pair = cast("WordPair", (np.uint32(static >> 32), np.uint32(static & 0xFFFFFFFF)))
    for index, stride in zip(first, strides, strict=True):
        if isinstance(index, jax.Array):
            pair = _add64(pair, _multiply64(index, stride))
    return Layout(tuple(block), strides, phase, wide), Origin(*pair, traced_phase)


def moved(origin: Origin, high: Any, low: Any) -> Origin:
    """The origin that is (high, low) cipher blocks further on."""
    return Origin(*_add64((origin.high, origin.low), (high, low)), origin.phase)


def block_index(layout: Layout, origin: Origin | None, group: jax.Array) -> WordPair:
    """Index of the cipher block of every element.

    ``group`` is the row group of every row, counted from the origin's; its axes are the
    layout's leading axes, one or more for the rows, and a single column.
    """
    *lead_strides, row_stride, _ = layout.strides
    shape = (*group.shape[:-1], layout.shape[-1])
    column = _iota(shape, len(shape) - 1)
    if not layout.wide:
        low = group * np.uint32(row_stride)
        for axis, stride in enumerate(lead_strides):
            low = low + _iota(group.shape, axis) * np.uint32(stride)
        if origin is not None:
            low = low + origin.low
        low = jnp.broadcast_to(low, shape) + column
        return jnp.zeros_like(low), low

    pair = _multiply64(group, row_stride)
    for axis, stride in enumerate(lead_strides):
        pair = _add64(pair, _multiply64(_iota(group.shape, axis), stride))
    if origin is not None:
        pair = _add64(pair, (origin.high, origin.low))
    row_pair = (jnp.broadcast_to(pair[0], shape), jnp.broadcast_to(pair[1], shape))
    return _add64(row_pair, (jnp.zeros_like(column), column))


def _packed_index(layout: Layout, origin: Origin | None, shape: tuple[int, ...]) -> WordPair:
    """Index of the cipher block of every group, where ``shape`` cuts the groups in slots of bytes.

    XLA:GPU computes small arrays, like the product of the groups and their stride, in a kernel of
    their own. If several masks share one, it also joins the kernels of all, and compiles for long.
    An iota of several axes avoids them.
    """
    *lead_strides, row_stride, _ = layout.strides
    slot_axis = len(shape) - 2
    if layout.wide:
        one_column = (*shape[:-1], 1)
        group = _iota(one_column, slot_axis - 1) * np.uint32(_GROUPS_PER_BYTE)
        return block_index(layout, origin, group + _iota(one_column, slot_axis))

    strides = (*lead_strides, row_stride * _GROUPS_PER_BYTE, row_stride, 1)
    low = jnp.zeros(shape, jnp.uint32) if origin is None else jnp.broadcast_to(origin.low, shape)
    end = len(shape)
    while end > 0:
        first = end - 1
        while first > 0 and strides[first - 1] == strides[first] * shape[first]:
            first -= 1
        run = _iota((math.prod(shape[first:end]),), 0) * np.uint32(strides[end - 1])
        low += lax.broadcast_in_dim(run.reshape(shape[first:end]), shape, range(first, end))
        end = first
    return jnp.zeros_like(low), low


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.uint32, shape, axis)


def _add64(a: WordPair, b: WordPair) -> WordPair:
    low = a[1] + b[1]
    carry = (low < a[1]).astype(jnp.uint32)
    return a[0] + b[0] + carry, low


def _multiply64(index: jax.Array, factor: int) -> WordPair:
    """Low 64 bits of a product, in 16-bit halves: kernels and older JAX lack its high half."""
    if index.dtype.itemsize == 8:
        high_half = lax.shift_right_logical(index, lax.full_like(index, 32))
        high = high_half.astype(jnp.uint32) * np.uint32(factor & 0xFFFFFFFF)
    else:
        high = jnp.zeros(index.shape, jnp.uint32)
    index = index.astype(jnp.uint32)
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    index0, index1 = index & mask, index >> half
    factor0, factor1 = np.uint32(factor & 0xFFFF), np.uint32((factor >> 16) & 0xFFFF)
    cross0, cross1 = index0 * factor1, index1 * factor0
    middle = ((index0 * factor0) >> half) + (cross0 & mask) + (cross1 & mask)
    high = high + index1 * factor1 + (cross0 >> half) + (cross1 >> half) + (middle >> half)
    high = high + index * np.uint32(factor >> 32)
    return high, index * np.uint32(factor & 0xFFFFFFFF)


# --- keys ---------------------------------------------------------------------------------


def key_words(key: Key) -> jax.Array:
    """The uint32 words of a typed or raw key, shape (n,)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.asarray(key)
    return jax.random.key_data(key).reshape(-1)


def spent_key_words(key: Key) -> jax.Array:
    """The words of a key, taken so that JAX's key-reuse checker counts the key as used."""
    # The checker does not count key_data() as a use, but it does count an opaque operation.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key_words(lax.optimization_barrier(key) if typed else key)


def like_key(words: jax.Array, key: Key) -> jax.Array:
    """Makes a key of the same kind as ``key`` from as many words as it needs."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return words[: key.shape[0]]
    shape = jax.eval_shape(jax.random.key_data, key).shape
    data = words[: math.prod(shape)].reshape(shape)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def absorb(key_words: jax.Array) -> WordPair:
    """Compresses a key of any width to two words."""
    words = [lax.index_in_dim(key_words, i, keepdims=False) for i in range(key_words.shape[0])]
    if len(words) == 2:
        return words[0], words[1]
    state = (jnp.uint32(MASK_TAG), jnp.uint32(len(words)))
    words += [jnp.uint32(0)] * (len(words) % 2)
    for pair in zip(words[::2], words[1::2], strict=True):
        state = threefry2x32(state, pair)
    return state


def mask_keys(key_words: jax.Array, digits: int, ordered: bool = False) -> list[WordPair]:
    """The cipher keys of a mask's digits, from counters that no other use of the key reaches.

    With ``ordered``, the last one is for the order of samples, of `_strata`.
    """
    state = absorb(key_words)
    digits_and_order = [*range(digits), *([_ORDER] if ordered else [])]
    return [
        threefry2x32(state, (jnp.uint32(MASK_TAG), jnp.uint32(LAW_VERSION << 16 | digit)))
        for digit in digits_and_order
    ]


def mask_key_words(key_words: jax.Array, digits: int, ordered: bool = False) -> jax.Array:
    """`mask_keys` in one array, of two words a key."""
    return jnp.stack([word for key in mask_keys(key_words, digits, ordered) for word in key])


def _pairs(words: jax.Array) -> list[WordPair]:
    parts = [lax.index_in_dim(words, i, keepdims=False) for i in range(words.shape[0])]
    return list(zip(parts[::2], parts[1::2], strict=True))


# --- the law ------------------------------------------------------------------------------


def keep(
    mask_key_words: jax.Array, threshold: Threshold, layout: Layout, origin: Origin | None
) -> jax.Array:
    """The mask of a block: True where the element is kept.

    Args:
      mask_key_words: words of the mask keys of the threshold's digits.
      threshold: threshold of the rate.
      layout: layout of the block.
      origin: origin of the block.

    Returns:
      Booleans of ``layout.shape``.
    """
    keys = _pairs(mask_key_words)
    if layout.shape[-2] > _LANES:
        return _packed(keys, threshold, layout, origin)
    kept = _elementwise(keys, threshold, layout, origin)
    return _apart(kept) if threshold.digits > 1 else kept


def uniform(mask_key_words: jax.Array, layout: Layout, origin: Origin | None) -> jax.Array:
    """The uniform numbers of a block, of two digits each: ``uniform < t`` is the mask.

    Args:
      mask_key_words: words of the mask keys of two digits.
      layout: layout of the block.
      origin: origin of the block.

    Returns:
      uint32 of ``layout.shape``, in units of 2^-32.
    """
    high, low = _digits(_pairs(mask_key_words), layout, origin)
    return _apart((high << np.uint32(DIGIT_BITS)) | low)


def _apart(numbers: jax.Array) -> jax.Array:
    """Keeps XLA:CPU from inlining two ciphers into the loop that consumes their numbers.

    If it inlines both into a long consumer, LLVM takes minutes for a 4 x 4 array, from JAX 0.12 on.
    JAX 0.10 removes the barrier, but does not need it.
    """
    return lax.optimization_barrier(numbers)


def _elementwise(
    keys: list[WordPair], threshold: Threshold, layout: Layout, origin: Origin | None
) -> jax.Array:
    """Every element hashes its own block: the reference."""
    return below(threshold, _digits(keys, layout, origin))


def _digits(keys: list[WordPair], layout: Layout, origin: Origin | None) -> list[jax.Array]:
    one_column = (*layout.shape[:-1], 1)
    row = _iota(one_column, len(one_column) - 2) + phase(layout, origin)
    lane = jnp.broadcast_to(row % np.uint32(_LANES), layout.shape)
    index = block_index(layout, origin, row // np.uint32(_LANES))

    def digit(key: WordPair) -> jax.Array:
        y0, y1 = threefry2x32(key, index)
        word = jnp.where(lane < 2, y0, y1)
        return (word >> (lane % 2 * np.uint32(DIGIT_BITS))) & _DIGIT_MASK

    return [digit(key) for key in keys]


def _packed(
    keys: list[WordPair], threshold: Threshold, layout: Layout, origin: Origin | None
) -> jax.Array:
    """Hashes every block once; the mask takes one bit per element until it is used.

    The four lanes become four bits of a byte, and a reduction joins the bits of two groups.
    It has to be a reduction: XLA materialises its result, but fuses elementwise packing into
    the consumer, where it evaluates the cipher once per element. Two groups per byte take half
    the time of eight per 32-bit word, which XLA:CPU vectorises over the groups. Two digits take
    three reductions, joined as bytes: in a single one XLA:CPU evaluates both ciphers for every
    lane, 10x slower.
    """
    *lead, rows, columns = layout.shape
    last_lane = _LANES - 1 if layout.phase is None else layout.phase
    groups = -(-(rows + last_lane) // _LANES)
    in_slots = (*lead, -(-groups // _GROUPS_PER_BYTE), _GROUPS_PER_BYTE, columns)
    slot_axis = len(lead) + 1

    index = _packed_index(layout, origin, in_slots)
    blocks = [threefry2x32(key, index) for key in keys]
    slot = lax.broadcasted_iota(jnp.uint8, in_slots, slot_axis)

    def pack(block: WordPair, test: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def bit(lane: int) -> jax.Array:
            return jnp.where(test(_lane(block, lane)), np.uint8(1 << lane), np.uint8(0))

        bits = bit(0) | bit(1) | bit(2) | bit(3)
        for _ in range(_LANES):
            bits = bits << slot  # not << 4 * slot, another small array that XLA:GPU would share
        return lax.reduce(bits, np.uint8(0), lax.bitwise_or, (slot_axis,))

    high = jnp.uint32(threshold.high)
    packed = pack(blocks[0], lambda digit: digit < high)
    if threshold.low is not None:
        low = jnp.uint32(threshold.low)
        tied = pack(blocks[0], lambda digit: digit == high)
        packed |= tied & pack(blocks[1], lambda digit: digit < low)

    shape = (*packed.shape[:-1], _GROUPS_PER_BYTE * _LANES, columns)
    dimensions = [axis for axis in range(len(shape)) if axis != slot_axis]
    byte = lax.broadcast_in_dim(packed, shape, dimensions)
    row = lax.broadcasted_iota(jnp.uint8, shape, slot_axis)
    mask = (byte >> row) & np.uint8(1) != 0
    mask = lax.reshape(mask, (*lead, shape[slot_axis - 1] * shape[slot_axis], columns))
    if layout.phase is None:
        return lax.dynamic_slice_in_dim(mask, phase(layout, origin), rows, axis=len(lead))
    return lax.slice_in_dim(mask, layout.phase, layout.phase + rows, axis=len(lead))


def in_registers(
    keys: list[WordPair], threshold: Threshold, layout: Layout, origin: Origin
) -> jax.Array:
    """The mask of a tile inside a Pallas TPU kernel: every block is hashed once and never stored.

    The four lanes of a group of rows become four bits of its word, and a gather over sublanes
    brings the word to its four rows.

    Args:
      keys: the cipher keys of the digits, of scalars.
      threshold: threshold of the rate.
      layout: layout of the tile, of phase 0, with ``TILE_ROWS`` rows or a multiple.
      origin: origin of the tile, of scalars.

    Returns:
      Booleans of the layout's rows and columns.
    """
    rows, columns = layout.shape[-2:]
    flat = layout._replace(shape=(rows, columns), strides=layout.strides[-2:])
    shape = (TILE_ROWS // _LANES, columns)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    # By bits: kernels have no cheap division.
    lane, part = row & (_LANES - 1), row >> (_LANES.bit_length() - 1)

    from_first = block_index(flat, None, _iota(shape, 0))

    def bits_of(group: int) -> jax.Array:
        high, low = divmod(group * flat.strides[0], 2**32)
        first = moved(origin, np.uint32(high), np.uint32(low))
        index = (from_first[0], from_first[1] + first.low)
        if flat.wide:
            index = _add64(from_first, (first.high, first.low))
        blocks = [threefry2x32(key, index) for key in keys]
        bits = jnp.zeros(shape, jnp.int32)
        for lane in range(_LANES):
            kept = below(threshold, [_lane(block, lane) for block in blocks])
            bits |= jnp.where(kept, np.int32(1 << lane), np.int32(0))
        return bits

    parts = []
    for group in range(0, rows // _LANES, shape[0]):
        bits = bits_of(group)
        for first in range(0, shape[0], shape[0] // _LANES):
            word = jnp.take_along_axis(bits, first + part, axis=0)
            parts.append((word >> lane) & 1)
    return jnp.concatenate(parts, axis=0) != 0


def by_lane(
    keys: list[WordPair], threshold: Threshold, layout: Layout, origin: Origin
) -> list[jax.Array]:
    """The mask of a tile inside a Pallas GPU kernel, apart for every lane of the row groups.

    Like `in_registers`, but the tile has any number of whole groups, and nothing moves a word
    between rows: the kernel reads and writes one lane of the groups after the other.
    """
    rows, columns = layout.shape[-2:]
    flat = layout._replace(shape=(rows, columns), strides=layout.strides[-2:])
    index = block_index(flat, origin, _iota((rows // _LANES, columns), 0))
    blocks = [threefry2x32(key, index) for key in keys]
    return [below(threshold, [_lane(block, lane) for block in blocks]) for lane in range(_LANES)]


def _lane(block: WordPair, lane: int) -> jax.Array:
    word = block[lane // 2]
    return word >> np.uint32(DIGIT_BITS) if lane % 2 else word & _DIGIT_MASK


def phase(layout: Layout, origin: Origin | None) -> np.uint32 | jax.Array:
    """Lane of the first row."""
    if layout.phase is not None:
        return np.uint32(layout.phase)
    assert origin is not None  # locate() leaves the phase open only with an origin
    assert origin.phase is not None
    return origin.phase
