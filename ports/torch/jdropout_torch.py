"""jdropout's masks, keys and subsets in PyTorch, bit for bit: copy this file into your project.

    key = site_key((0, 42), step=7, site="encoder")    # (0, 42) are the words of jax.random.key(42)
    y = dropout(key, x, 0.1, training=model.training)

A key is a tuple of its words, as `jax.random.key_data(key)` gives them. Functions, arguments and
numbers are those of `jdropout` and `jdropout.keys`; the laws are in jdropout's docs/law.md and
docs/keys.md. It needs only PyTorch 2.0 or later. The mask is made on the device of the array, in
64-bit integers, because PyTorch has no additions of unsigned 32-bit ones everywhere.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Key = tuple[int, ...]
Words = tuple[Tensor | int, Tensor | int]

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
_MASK_TAG, _INDEX_TAG, _WORDS_TAG = 0x6A64726F, 0x6A646978, 0x6A647764
_LANES = 4


def threefry2x32(key: Words, counter: Words) -> Words:
    """The cipher, Threefry-2x32-20; words are integers or int64 tensors of 32-bit words."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = (counter[0] + schedule[0]) & _WORD, (counter[1] + schedule[1]) & _WORD
    for step in range(20):
        distance = _ROTATIONS[step % 8]
        x0 = (x0 + x1) & _WORD
        x1 = (((x1 << distance) | (x1 >> (32 - distance))) & _WORD) ^ x0
        if step % 4 == 3:
            turn = step // 4 + 1
            x0 = (x0 + schedule[turn % 3]) & _WORD
            x1 = (x1 + schedule[(turn + 1) % 3] + turn) & _WORD
    return x0, x1


# --- keys ---------------------------------------------------------------------------------


def site_key(root: Key, *, step: int, site: str | int | Sequence, microbatch: int = 0) -> Key:
    """The key of a site in a microbatch of a step; see `jdropout.keys.site_key`."""
    key = child_key(root, (0x80000000 | step >> 32, step & _WORD))
    return at_site(child_key(key, (_INDEX_TAG, microbatch)), site)


def at_site(key: Key, site: str | int | Sequence) -> Key:
    """The key at a path of names and indices below a key; see `jdropout.keys.at_site`."""
    for part in [site] if isinstance(site, str | int) else site:
        key = child_key(key, name_counter(part) if isinstance(part, str) else (_INDEX_TAG, part))
    return key


def name_counter(name: str) -> tuple[int, int]:
    """The counter of a name: step 4 of the key law."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
    pairs = zip(words[::2], words[1::2], strict=True)
    reserved = (0, _MASK_TAG, _INDEX_TAG, _WORDS_TAG)
    return next(pair for pair in pairs if pair[0] not in reserved)


def fold_in(key: Key, number: int) -> Key:
    """`jax.random.fold_in(key, number)` for the two words of a Threefry key.

    It is also ``jax.random.split(key, n)[number]``, and, if `key` is the key of a random stream of
    Flax nnx, the key of its call number `number`.
    """
    first, second = key
    return threefry2x32((first, second), (0, number))


def child_key(key: Key, counter: tuple[int, int]) -> Key:
    """The key one level below a key: step 1 of the key law."""
    state = threefry2x32(_absorbed(key), counter)
    words = [*state]
    for number in range(1, (len(key) + 1) // 2):
        words += threefry2x32(state, (_WORDS_TAG, number))
    return tuple(words[: len(key)])


def _absorbed(key: Key) -> tuple[int, int]:
    words = [int(word) for word in key]
    if len(words) == 2:
        return words[0], words[1]
    state: Words = (_MASK_TAG, len(words))
    words += [0] * (len(words) % 2)
    for pair in zip(words[::2], words[1::2], strict=True):
        state = threefry2x32(state, pair)
    return state


# --- masks --------------------------------------------------------------------------------


def mask_key(key: Key, digit: int) -> Key:
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
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask that `dropout` applies: True where an element is kept; see `jdropout.keep_mask`."""
    number, digits = threshold(rate, precision)
    drawn = uniform_numbers(key, digits, shape, broadcast_dims, start, global_shape, device)
    return (drawn < number).expand(tuple(shape))


def uniform_numbers(
    key: Key,
    digits: int,
    shape: Sequence[int],
    broadcast_dims: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The uniform numbers that a mask compares: int64, of one digit of 16 bits or of two.

    Args:
      key: the words of a key.
      digits: 1 or 2. Noise and subsets are made of numbers of two.
      shape: shape of the numbers.
      broadcast_dims: axes along which they are the same, which have size 1 in the result.
      start: index of the first element within an array of `global_shape`.
      global_shape: shape of the whole; None for `shape`.
      device: device to make them on.
    """
    shared = {axis % len(shape) for axis in broadcast_dims}
    whole = [
        1 if axis in shared else size
        for axis, size in enumerate(shape if global_shape is None else global_shape)
    ]
    axes = [axis for axis, size in enumerate(whole) if size != 1]
    sizes = [whole[axis] for axis in axes]
    counts = [shape[axis] for axis in axes]
    first = [0 if start is None else int(start[axis]) for axis in axes]
    while len(sizes) < 2:  # a single axis is that of the rows
        sizes, counts, first = [*sizes, 1], [*counts, 1], [*first, 0]

    def along(axis: int, begin: int, count: int) -> Tensor:
        index = torch.arange(begin, begin + count, dtype=torch.int64, device=device)
        return index.reshape([-1 if a == axis else 1 for a in range(len(sizes))])

    *lead, rows, columns = range(len(sizes))
    first_group, phase = divmod(first[rows], _LANES)
    num_groups = -(-(phase + counts[rows]) // _LANES)
    groups = -(-sizes[rows] // _LANES)
    index = along(rows, first_group, num_groups)
    stride = groups
    for axis in reversed(lead):
        index = index + along(axis, first[axis], counts[axis]) * stride
        stride *= sizes[axis]
    index = index * sizes[columns] + along(columns, first[columns], counts[columns])

    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for digit in range(digits):
        block = threefry2x32(mask_key(key, digit), (index >> 32 & _WORD, index & _WORD))
        lanes = [block[0] & 0xFFFF, block[0] >> 16, block[1] & 0xFFFF, block[1] >> 16]
        numbers = numbers << 16 | torch.stack(lanes, rows + 1)
    numbers = numbers.flatten(rows, rows + 1).narrow(rows, phase, counts[rows])
    return numbers.reshape([1 if w == 1 else n for w, n in zip(whole, shape, strict=True)])


# --- dropout ------------------------------------------------------------------------------


def dropout(
    key: Key | None,
    x: Tensor,
    rate: float,
    *,
    training: bool = True,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> Tensor:
    """Zeroes elements at random and scales up the rest; see `jdropout.dropout`.

    The backward pass makes the mask again: nothing is stored but the key.
    """
    number, digits = threshold(rate, precision)
    if not training or number == 2 ** (16 * digits):
        return x
    if key is None:
        raise ValueError("key is missing. Pass the words of a key, such as (0, 42).")
    place = (tuple(broadcast_dims), start, global_shape, precision)
    return _Dropout.apply(x, key, rate, place)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, key: Key, rate: float, place: tuple) -> Tensor:
        ctx.draw = key, rate, place
        return _masked_scale(x, key, rate, place)

    @staticmethod
    def backward(ctx, y_bar: Tensor) -> tuple[Tensor, None, None, None]:
        # Its own derivative, so that there are some of any order.
        return _Dropout.apply(y_bar, *ctx.draw), None, None, None


def _masked_scale(x: Tensor, key: Key, rate: float, place: tuple) -> Tensor:
    broadcast_dims, start, global_shape, precision = place
    keep = keep_mask(
        key,
        rate,
        x.shape,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
        device=x.device,
    )
    kept = _keep_probability(*threshold(rate, precision))
    # The factor is rounded once, to float32 or wider, and the product to x's dtype.
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = torch.tensor(float(1 / kept) if kept else 1.0, dtype=wide, device=x.device)
    return torch.where(keep, x.to(wide) * factor, 0).to(x.dtype)


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
    device: torch.device | str | None = None,
) -> Tensor:
    """The indices of a random subset of exact size, in order; see `jdropout.keep_indices`.

    They are int64, as PyTorch's own indices.
    """
    if groups < 1 or size % groups:
        raise ValueError(f"groups must divide the {size} elements to choose from, got {groups}.")
    group_size = size // groups
    if start is not None and start[-1] % group_size:
        raise ValueError(f"start must be the beginning of a group of {group_size} elements.")
    count = kept_count(group_size, rate)
    if count == group_size:
        return torch.arange(size, device=device).expand(*shape, size)
    if key is None:
        raise ValueError("key is missing. Pass the words of a key, such as (0, 42).")
    numbers = uniform_numbers(key, 2, (*shape, size), (), start, global_shape, device)
    numbers = numbers.reshape(*shape, groups, group_size)
    order = torch.sort(numbers, dim=-1, stable=True).indices  # of equal numbers the first is kept
    first = torch.arange(0, size, group_size, device=device)
    kept = order[..., :count].sort(dim=-1).values + first[:, None]
    return kept.reshape(*shape, groups * count)


def kept_count(group_size: int, rate: float) -> int:
    """How many elements of a group are kept: step 2 of the subset law."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}. It is the fraction to drop.")
    # The double closest to 0.95 is less, so that 10 * (1 - 0.95) is above 0.5.
    return max(1, round(round(group_size * (1 - Fraction(float(rate))), 6)))
