"""The laws of masks, subsets and keys once more, in NumPy, from their text alone.

The text is in docs/law.md and keys.md. The twin shares no code with the library and favours
plainness over speed: one cipher call per element, 64-bit integers, no packing.
"""

import hashlib
from fractions import Fraction

import numpy as np

TAG = 0x6A64726F
INDEX_TAG = 0x6A646978
WORDS_TAG = 0x6A647764
WORD = np.uint64(0xFFFFFFFF)


def threefry2x32(key, counter, rounds=20):
    """Threefry-2x32; words are uint64 arrays that hold 32-bit values."""
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint64(0x1BD11BDA))
    x0 = (np.asarray(counter[0], np.uint64) + k[0]) & WORD
    x1 = (np.asarray(counter[1], np.uint64) + k[1]) & WORD
    for r in range(rounds):
        x0 = (x0 + x1) & WORD
        distance = np.uint64(rotations[r % 8])
        x1 = ((x1 << distance) | (x1 >> (np.uint64(32) - distance))) & WORD
        x1 = x1 ^ x0
        if r % 4 == 3:
            s = r // 4 + 1
            x0 = (x0 + k[s % 3]) & WORD
            x1 = (x1 + k[(s + 1) % 3] + np.uint64(s)) & WORD
    return x0, x1


def absorbed(key_words):
    """Two words that stand for all words of a key."""
    words = [int(word) for word in key_words]
    if len(words) == 2:
        return words
    state = [TAG, len(words)]
    if len(words) % 2:
        words.append(0)
    for i in range(0, len(words), 2):
        state = threefry2x32(state, words[i : i + 2])
    return state


def mask_key(key_words, digit):
    """Step 6: absorb the key's words, then take one block at the tagged counter."""
    return threefry2x32(absorbed(key_words), (TAG, (1 << 16) | digit))


def mask_keys(key_words, digits):
    """The words of the keys of as many digits."""
    return np.concatenate([mask_key(key_words, digit) for digit in range(digits)])


def threshold(rate, precision=None):
    """The keep threshold t and its number of digits; exact, ties to even."""
    keep = 1 - Fraction(float(rate))
    t16 = round(keep * 2**16)
    if precision == 16:
        return t16, 1
    miss = abs(Fraction(t16, 2**16) - keep)
    if precision is None and miss <= Fraction(float(rate)) / 1000:
        return t16, 1
    return round(keep * 2**32), 2


def keep_mask(key_words, rate, shape, broadcast_dims=(), start=None, whole=None, precision=None):
    """The mask of a block of ``shape`` at ``start`` in a mask of shape ``whole``."""
    t, digits = threshold(rate, precision)
    return numbers(key_words, digits, shape, broadcast_dims, start, whole) < np.uint64(t)


def uniform(key_words, shape, broadcast_dims=(), start=None, whole=None):
    """The uniform numbers that noise is made of: both digits, in units of 2^-32."""
    return numbers(key_words, 2, shape, broadcast_dims, start, whole)


def numbers(key_words, digits, shape, broadcast_dims, start, whole):
    """Steps 1 to 4: uint64 numbers of so many base-2^16 digits."""
    whole = list(shape if whole is None else whole)
    start = [0] * len(whole) if start is None else list(start)
    for axis in broadcast_dims:
        whole[axis] = 1
    index = []  # global position of every element of the block, on the axes that are left
    sizes = []
    for axis, size in enumerate(whole):
        if size != 1:
            along = np.arange(shape[axis], dtype=np.uint64) + np.uint64(start[axis])
            index.append(along.reshape([-1 if a == axis else 1 for a in range(len(whole))]))
            sizes.append(size)
    if len(sizes) == 0:
        index, sizes = [np.uint64(0), np.uint64(0)], [1, 1]
    elif len(sizes) == 1:
        index, sizes = [*index, np.uint64(0)], [*sizes, 1]
    *lead, row, column = index
    *lead_sizes, rows, columns = sizes

    lead_index = np.uint64(0)
    for position, size in zip(lead, lead_sizes, strict=True):
        lead_index = lead_index * np.uint64(size) + position
    group, lane = row // np.uint64(4), row % np.uint64(4)
    group_count = np.uint64(-(-rows // 4))
    block = (lead_index * group_count + group) * np.uint64(columns) + column

    u = np.uint64(0)
    for digit in range(digits):
        y0, y1 = threefry2x32(mask_key(key_words, digit), (block >> np.uint64(32), block & WORD))
        y = np.where(lane < 2, y0, y1)
        field = (y >> (lane % np.uint64(2) * np.uint64(16))) & np.uint64(0xFFFF)
        u = (u << np.uint64(16)) | field
    return np.broadcast_to(u, shape)


def kept_count(n, rate):
    """The number of kept elements in a group of n; exact, ties to even."""
    millionths = round(n * (1 - Fraction(float(rate))) * 10**6)
    return max(1, round(Fraction(millionths, 10**6)))


def keep_indices(key_words, rate, size, groups=1, shape=(), start=None, whole=None):
    """The subset law: the indices of the kept elements, of a part at ``start`` in ``whole``."""
    uniforms = uniform(key_words, (*shape, size), (), start, whole)
    n = size // groups
    kept = []
    for index in np.ndindex(*shape):
        for first in range(0, size, n):
            by_uniform = sorted(range(first, first + n), key=lambda i: (uniforms[index][i], i))
            kept += sorted(by_uniform[: kept_count(n, rate)])
    return np.array(kept, np.int32).reshape(*shape, -1)


def name_counter(name):
    """The first pair of words of the name's SHA-256 whose first word nothing else uses."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    for i in range(0, 32, 8):
        high = int.from_bytes(digest[i : i + 4], "big")
        if high not in (0, TAG, INDEX_TAG, WORDS_TAG):
            return high, int.from_bytes(digest[i + 4 : i + 8], "big")
    raise AssertionError("a digest of reserved words alone")


def child_key(key_words, counter):
    """The words of a key one level below."""
    state = threefry2x32(absorbed(key_words), counter)
    words = [*state]
    for number in range(1, (len(key_words) + 1) // 2):
        words += threefry2x32(state, (WORDS_TAG, number))
    return [int(word) for word in words[: len(key_words)]]


def at_site(key_words, site):
    """The words of the key at a path of names and indices below a key."""
    for part in site if isinstance(site, tuple | list) else [site]:
        counter = name_counter(part) if isinstance(part, str) else (INDEX_TAG, int(part))
        key_words = child_key(key_words, counter)
    return key_words


def site_key(key_words, step, site, microbatch=0):
    """The words of the key of a site in a microbatch of a step."""
    step = int(step)
    key_words = child_key(key_words, (0x80000000 | step >> 32, step & 0xFFFFFFFF))
    return at_site(child_key(key_words, (INDEX_TAG, int(microbatch))), site)
