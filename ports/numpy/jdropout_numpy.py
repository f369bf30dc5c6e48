"""jdropout's masks, keys and subsets in NumPy, bit for bit: copy this file into your project.

    key = site_key((0, 42), step=7, site="encoder")    # (0, 42) are the words of jax.random.key(42)
    y = dropout(key, x, 0.1)
    x_bar = dropout(key, y_bar, 0.1)                   # the backward pass: dropout is linear

A key is a tuple of its words, as `jax.random.key_data(key)` gives them. Functions, arguments and
numbers are those of `jdropout` and `jdropout.keys`; the laws are in jdropout's docs/law.md and
docs/keys.md. It needs NumPy only, and is written to be read by those who port the laws to another
language: integers are Python's or 32-bit words, but for the 64-bit index of a block.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Key = Sequence[int]

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
_MASK_TAG, _INDEX_TAG, _WORDS_TAG = 0x6A64726F, 0x6A646978, 0x6A647764
_ORDER = 2  # in place of a digit
_LANES = 4


def threefry2x32(key: Any, counter: Any, rounds: int = 20) -> tuple[Any, Any]:
    """The cipher, Threefry-2x32; words are Python integers or uint32 arrays."""

    def word(x: Any) -> Any:
        return x & _WORD if isinstance(x, int) else x  # arrays wrap on their own

    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = word(counter[0] + schedule[0]), word(counter[1] + schedule[1])
    for step in range(rounds):
        distance = _ROTATIONS[step % 8]
        x0 = word(x0 + x1)
        x1 = word(x1 << distance | x1 >> (32 - distance)) ^ x0
        if step % 4 == 3:
            turn = step // 4 + 1
            x0 = word(x0 + schedule[turn % 3])
            x1 = word(x1 + word(schedule[(turn + 1) % 3] + turn))
    return x0, x1


# --- keys ---------------------------------------------------------------------------------


def site_key(
    root: Key, *, step: int, site: str | int | Sequence, microbatch: int = 0
) -> tuple[int, ...]:
    """The key of a site in a microbatch of a step; see `jdropout.keys.site_key`."""
    key = child_key(root, (0x80000000 | int(step) >> 32, int(step) & _WORD))
    return at_site(child_key(key, (_INDEX_TAG, int(microbatch))), site)


def at_site(key: Key, site: str | int | Sequence) -> tuple[int, ...]:
    """The key at a path of names and indices below a key; see `jdropout.keys.at_site`."""
    for part in site if isinstance(site, tuple | list) else [site]:
        key = child_key(key, name_counter(part) if isinstance(part, str) else (_INDEX_TAG, part))
    return tuple(int(word) for word in key)


def fold_in(key: Key, number: int) -> tuple[int, int]:
    """`jax.random.fold_in(key, number)` for the two words of a Threefry key.

    It is also ``jax.random.split(key, n)[number]``, and, if `key` is the key of a random stream of
    Flax nnx, the key of its call number `number`.
    """
    first, second = (int(word) for word in key)
    return threefry2x32((first, second), (0, int(number)))


def child_key(key: Key, counter: tuple[int, int]) -> tuple[int, ...]:
    """The key one level below a key: step 1 of the key law."""
    high, low = counter
    state = threefry2x32(_absorbed(key), (int(high), int(low)))
    words = [*state]
    for number in range(1, (len(key) + 1) // 2):
        words += threefry2x32(state, (_WORDS_TAG, number))
    return tuple(words[: len(key)])


def name_counter(name: str) -> tuple[int, int]:
    """The counter of a name: step 4 of the key law."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
    pairs = zip(words[::2], words[1::2], strict=True)
    reserved = (0, _MASK_TAG, _INDEX_TAG, _WORDS_TAG)
    return next(pair for pair in pairs if pair[0] not in reserved)


def _absorbed(key: Key) -> tuple[int, int]:
    words = [int(word) for word in key]
    if len(words) == 2:
        return words[0], words[1]
    state = (_MASK_TAG, len(words))
    words += [0] * (len(words) % 2)
    for pair in zip(words[::2], words[1::2], strict=True):
        state = threefry2x32(state, pair)
    return state


# --- masks --------------------------------------------------------------------------------


def mask_key(key: Key, digit: int) -> tuple[int, int]:
    """The key under which the blocks of a digit are hashed: step 6 of the mask law."""
    return threefry2x32(_absorbed(key), (_MASK_TAG, 1 << 16 | digit))


def threshold(rate: float, precision: int | None = None) -> tuple[int, int]:
    """The integer that numbers are compared with, and how many digits of 16 bits these have."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}. It is the probability of dropping.")
    if precision not in (None, 16, 32):
        raise ValueError(f"precision must be None, 16 or 32, got {precision}. None chooses.")
    keep = 1 - Fraction(float(rate))
    one_digit = round(keep * 2**16)  # of a fraction: exact, ties to even
    miss = abs(Fraction(one_digit, 2**16) - keep)
    if precision == 16 or (precision is None and miss * 1000 <= Fraction(float(rate))):
        return one_digit, 1
    return round(keep * 2**32), 2


def effective_rate(rate: float, *, precision: int | None = None) -> float:
    """The drop probability that the mask has: the rate, rounded to 16 or 32 bits."""
    return float(1 - _keep_probability(*threshold(rate, precision)))


def _keep_probability(number: int, digits: int) -> Fraction:
    return Fraction(number, 2 ** (16 * digits))


def keep_mask(
    key: Key,
    rate: float,
    shape: Sequence[int],
    *,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
    sample: tuple[int, int] | None = None,
) -> np.ndarray:
    """The mask that `dropout` applies: True where an element is kept; see `jdropout.keep_mask`.

    ``sample = (number, size)`` is for one of several samples; see `jdropout.keys.stratified_key`.
    """
    number, digits = threshold(rate, precision)
    drawn = uniform_numbers(key, digits, shape, broadcast_dims, start, global_shape, sample)
    kept = drawn < np.uint64(number)  # which may be 2**32
    return np.broadcast_to(kept, tuple(shape))


def uniform_numbers(
    key: Key,
    digits: int,
    shape: Sequence[int],
    broadcast_dims: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    sample: tuple[int, int] | None = None,
) -> np.ndarray:
    """The uniform numbers that a mask compares: uint32, of one digit of 16 bits or of two.

    Args:
      key: the words of a key.
      digits: 1 or 2. Noise and subsets are made of numbers of two.
      shape: shape of the numbers.
      broadcast_dims: axes along which they are the same, which have size 1 in the result.
      start: index of the first element within an array of `global_shape`.
      global_shape: shape of the whole; None for `shape`.
      sample: number of the sample, and how many are coupled; None if there is only one.
    """
    numbers = np.zeros((), np.uint32)
    for digit in range(digits):
        drawn = _digit(key, digit, shape, broadcast_dims, start, global_shape)
        if digit == 0 and sample:
            order = _digit(key, _ORDER, shape, broadcast_dims, start, global_shape)
            drawn = (drawn + _shift(order, *sample)) % 2**16
        numbers = numbers << 16 | drawn
    return numbers


def _digit(
    key: Key,
    digit: int,
    shape: Sequence[int],
    broadcast_dims: Sequence[int],
    start: Sequence[int] | None,
    global_shape: Sequence[int] | None,
) -> np.ndarray:
    """The 16 bits of every position under the key of a digit; the arguments are as above."""
    whole = [*map(int, shape if global_shape is None else global_shape)]
    for axis in broadcast_dims:
        whole[axis] = 1
    axes = [axis for axis, size in enumerate(whole) if size != 1]
    sizes = [whole[axis] for axis in axes]
    counts = [int(shape[axis]) for axis in axes]
    first = [0 if start is None else int(start[axis]) for axis in axes]
    while len(sizes) < 2:  # a single axis is that of the rows
        sizes, counts, first = [*sizes, 1], [*counts, 1], [*first, 0]

    def along(axis: int, begin: int, count: int) -> np.ndarray:
        index = np.arange(count, dtype=np.uint64) + np.uint64(begin)
        return index.reshape([-1 if a == axis else 1 for a in range(len(sizes))])

    # Four rows share a block: hash the blocks that the rows meet, and cut the rows out.
    *lead, rows, columns = range(len(sizes))
    first_group, phase = divmod(first[rows], _LANES)
    num_groups = -(-(phase + counts[rows]) // _LANES)
    block = along(rows, first_group, num_groups)
    stride = -(-sizes[rows] // _LANES)
    for axis in reversed(lead):
        block = block + along(axis, first[axis], counts[axis]) * np.uint64(stride)
        stride *= sizes[axis]
    block = block * np.uint64(sizes[columns]) + along(columns, first[columns], counts[columns])
    counter = ((block >> np.uint64(32)).astype(np.uint32), block.astype(np.uint32))

    y0, y1 = threefry2x32(mask_key(key, digit), counter)
    numbers = np.stack([y0 & 0xFFFF, y0 >> 16, y1 & 0xFFFF, y1 >> 16], axis=rows + 1)
    *lead_counts, _, _, column_count = numbers.shape
    numbers = numbers.reshape(*lead_counts, num_groups * _LANES, column_count)
    numbers = numbers[..., phase : phase + counts[rows], :]
    return numbers.reshape([1 if w == 1 else n for w, n in zip(whole, shape, strict=True)])


def _shift(bits: np.ndarray, number: int, size: int) -> np.ndarray:
    """What a sample adds to the first digits: its stratum, by steps 2 to 4 of the strata law."""
    prime = size + 1
    while any(prime % factor == 0 for factor in range(2, prime)):
        prime += 1
    factor = 1 + bits.astype(np.int64) * (prime - 1) // 2**16
    own = factor * (number + 1) % prime
    stratum = sum((factor * other % prime < own).astype(np.int64) for other in range(1, size + 1))
    return (2**16 * stratum // size).astype(np.uint32)


# --- dropout ------------------------------------------------------------------------------


def dropout(
    key: Key | None,
    x: np.ndarray,
    rate: float,
    *,
    training: bool = True,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> np.ndarray:
    """Zeroes elements at random and scales up the rest; see `jdropout.dropout`.

    The function is linear and its own transpose: the gradient with respect to `x` is the same
    call with the gradient of the output in its place.
    """
    number, digits = threshold(rate, precision)
    if not training or number == 2 ** (16 * digits):
        return x
    if key is None:
        raise ValueError("key is missing. Pass the words of a key, such as (0, 42).")
    keep = keep_mask(
        key,
        rate,
        x.shape,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    kept = _keep_probability(number, digits)
    # The factor is rounded once, to float32 or wider, and the product to x's dtype.
    wide = np.promote_types(x.dtype, np.float32)
    factor = wide.type(float(1 / kept) if kept else 1.0)
    return np.where(keep, x.astype(wide) * factor, wide.type(0)).astype(x.dtype)


# --- subsets ------------------------------------------------------------------------------


def keep_indices(
    key: Key | None,
    rate: float,
    size: int,
    *,
    groups: int = 1,
    shape: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    sample: tuple[int, int] | None = None,
) -> np.ndarray:
    """The indices of a random subset of exact size, in order; see `jdropout.keep_indices`."""
    if groups < 1 or size % groups:
        raise ValueError(f"groups must divide the {size} elements to choose from, got {groups}.")
    group_size = size // groups
    if start is not None and start[-1] % group_size:
        raise ValueError(f"start must be the beginning of a group of {group_size} elements.")
    count = kept_count(group_size, rate)
    if count == group_size:
        return np.broadcast_to(np.arange(size, dtype=np.int32), (*shape, size))
    if key is None:
        raise ValueError("key is missing. Pass the words of a key, such as (0, 42).")
    numbers = uniform_numbers(key, 2, (*shape, size), (), start, global_shape, sample)
    numbers = numbers.reshape(*shape, groups, group_size)
    order = np.argsort(numbers, axis=-1, kind="stable")  # of equal numbers the first is kept
    kept = np.sort(order[..., :count], axis=-1) + np.arange(0, size, group_size)[:, None]
    return kept.astype(np.int32).reshape(*shape, groups * count)


def kept_count(group_size: int, rate: float) -> int:
    """How many elements of a group are kept: step 2 of the subset law."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}. It is the fraction to drop.")
    # The double closest to 0.95 is less, so that 10 * (1 - 0.95) is above 0.5.
    return max(1, round(round(group_size * (1 - Fraction(float(rate))), 6)))
