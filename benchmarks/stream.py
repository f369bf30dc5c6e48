"""Writes the laws' random bits to standard output as raw bytes, for batteries of tests.

    python benchmarks/stream.py rows | RNG_test stdin32 -tlmax 16GB
    python benchmarks/stream.py uniforms --seed 7 --bytes 1000000 | ent

A stream is a function of a key and the number of a chunk. Without `--bytes` it goes on until its
reader stops. The mask law's bits are masks at rate 1/2, eight elements a byte: fair bits, if the
law is right. `STREAMS` tells what follows what in each; `WEAK` has streams with known flaws, which
a battery that is worth anything rejects. `randomness.py` runs the batteries.
"""

import argparse
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jdropout
from jdropout.keys import site_key, stratified_key

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "ports" / "numpy"))

import jdropout_numpy

ROWS, COLUMNS = 512, 4096
CHUNKS = 1 << 21
"""Chunks of one mask, of 2^42 elements, after which comes the mask of the next seed."""

KEYS, SIDE = 1 << 12, 16
"""Keys of a chunk in which keys alternate, and rows and columns of each one's mask."""

SUBSETS = 256, 1024
"""Subsets of a chunk, and groups of two in each."""

Stream = Callable[[jax.Array, jax.Array], jax.Array]
Cipher = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def chunk(key: jax.Array, number: jax.Array) -> jax.Array:
    """The mask of some rows of one huge mask."""
    place = dict(start=(number * ROWS, 0), global_shape=(CHUNKS * ROWS, COLUMNS))
    return jdropout.keep_mask(key, 0.5, (ROWS, COLUMNS), **place)


def rows(key: jax.Array, number: jax.Array) -> jax.Array:
    """Masks, row by row: neighbouring columns, of different blocks, follow each other."""
    return chunk(key, number)


def columns(key: jax.Array, number: jax.Array) -> jax.Array:
    """Masks, column by column: the four lanes of a block follow each other."""
    place = dict(start=(0, number * COLUMNS), global_shape=(ROWS, CHUNKS // 8 * COLUMNS))
    return jnp.packbits(jdropout.keep_mask(key, 0.5, (ROWS, COLUMNS), **place), axis=0).T


def alternating(keys: jax.Array) -> jax.Array:
    """Masks of many keys: the bits of all keys at one position, then those at the next one."""
    masks = jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (SIDE, SIDE)))(keys)
    return jnp.packbits(masks.reshape(KEYS, SIDE * SIDE), axis=0).T


def numbers(number: jax.Array) -> jax.Array:
    """Numbers of the keys in a chunk."""
    return number * KEYS + jnp.arange(KEYS)


def fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    """Keys `fold_in(key, 0)`, `fold_in(key, 1)`, ..., which alternate."""
    return alternating(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers(number)))


def seeds(key: jax.Array, number: jax.Array) -> jax.Array:
    """Keys of the seeds `--seed` and following, which alternate."""
    first = jax.random.key_data(key)[1]
    return alternating(jax.vmap(jax.random.key)(first + numbers(number).astype(jnp.uint32)))


def steps(key: jax.Array, number: jax.Array) -> jax.Array:
    """Keys of consecutive steps of a training at one site, which alternate."""
    step_keys = jax.vmap(lambda step: site_key(key, step=step, site="hidden"))
    return alternating(step_keys(numbers(number)))


def sites(key: jax.Array, number: jax.Array) -> jax.Array:
    """Keys of 32 sites in each of consecutive steps, which alternate."""

    def of_site(count: jax.Array) -> jax.Array:
        return site_key(key, step=count // 32, site=("block", count % 32, "mlp"))

    return alternating(jax.vmap(of_site)(numbers(number)))


def subsets(key: jax.Array, number: jax.Array) -> jax.Array:
    """Which one of two neighbours `keep_indices` keeps: a fair bit for each group of two."""
    count, groups = SUBSETS
    place = dict(start=(number * count, 0), global_shape=(CHUNKS * count, 2 * groups))
    kept = jdropout.keep_indices(key, 0.5, 2 * groups, groups=groups, shape=(count,), **place)
    return kept % 2 == 1


def strata(key: jax.Array, number: jax.Array) -> jax.Array:
    """Masks of sample 3 of 10 coupled ones, row by row.

    The samples of one key depend on each other on purpose, so that each unit is dropped in its
    share of them: a stream that mixed them would fail. The bits of one sample are independent.
    """
    return chunk(stratified_key(key, 3, 10), number)


def uniforms(key: jax.Array, number: jax.Array) -> np.ndarray:
    """The uniform numbers under the masks, 32 bits each: all bits of the cipher's blocks.

    The library has no public function for them. These are from its port to NumPy, which the test
    suite compares with it bit for bit.
    """
    place = dict(start=(int(number) * ROWS, 0), global_shape=(CHUNKS * ROWS, COLUMNS // 8))
    words = jax.random.key_data(key).tolist()
    return jdropout_numpy.uniform_numbers(words, 2, (ROWS, COLUMNS // 8), **place)


STREAMS: dict[str, Stream] = {
    stream.__name__: jax.jit(stream)
    for stream in (rows, columns, fold_in, seeds, steps, sites, subsets, strata)
} | {"uniforms": uniforms}


# --- streams with known flaws -------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def blocks(cipher: Cipher, key: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A cipher's blocks under a chunk of `rows`."""
    count = ROWS // 4 * COLUMNS
    low = jnp.uint32(count) * number.astype(jnp.uint32)
    high = number.astype(jnp.uint32) // np.uint32(2**32 // count)
    return cipher(key, high, low + jnp.arange(count, dtype=jnp.uint32))


@jax.jit
def fields(y0: jax.Array, y1: jax.Array) -> jax.Array:
    """The mask of a chunk of `rows`, from its blocks."""
    lanes = [y & np.uint32(0xFFFF) if half == 0 else y >> 16 for y in (y0, y1) for half in (0, 1)]
    lanes = [lane.reshape(ROWS // 4, COLUMNS) for lane in lanes]
    return jnp.stack(lanes, axis=1).reshape(ROWS, COLUMNS) < 1 << 15


def with_cipher(cipher: Cipher) -> Stream:
    """`rows`, with another cipher: in two programs, as XLA:CPU takes minutes to compile one."""
    return lambda key, number: fields(*blocks(cipher, key, number))


def threefry(
    key: jax.Array, rounds: int, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The law's cipher, with any number of rounds."""
    words = jnp.asarray(key, jnp.uint32)
    schedule = (words[0], words[1], words[0] ^ words[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = high + schedule[0], low + schedule[1]
    for step in range(rounds):
        distance = (13, 15, 26, 6, 17, 29, 16, 24)[step % 8]
        x0 += x1
        x1 = (x1 << distance | x1 >> (32 - distance)) ^ x0
        if step % 4 == 3:
            turn = step // 4 + 1
            x0 += schedule[turn % 3]
            x1 += schedule[(turn + 1) % 3] + np.uint32(turn)
    return x0, x1


def with_rounds(rounds: int) -> Stream:
    def cipher(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        tag = jnp.uint32(0x6A64726F), jnp.uint32(1 << 16)
        mask_key = jnp.stack(threefry(jax.random.key_data(key), 20, *tag))
        return threefry(mask_key, rounds, high, low)

    return with_cipher(cipher)


def reused(key: jax.Array, number: jax.Array) -> jax.Array:
    """Masks of consecutive steps, 512 bytes each, of which every two have the same key."""
    pairs = jax.vmap(lambda step: site_key(key, step=step, site="hidden"))
    masks = jax.vmap(lambda key: jdropout.keep_mask(key, 0.5, (64, 64)))
    return masks(pairs((number * 256 + jnp.arange(256)) // 2))


def counter(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block's number, multiplied by odd constants, in place of the cipher."""
    return low * np.uint32(0x9E3779B9) + high, low * np.uint32(0x85EBCA6B) + high


WEAK: dict[str, Stream] = {
    "5-rounds": with_rounds(5),
    "reused": jax.jit(reused),
    "counter": with_cipher(counter),
}

ROUNDS: dict[str, Stream] = {f"{n}-rounds": with_rounds(n) for n in range(6, 21)}
"""With more rounds of the cipher, up to the law's 20: where does a battery lose its track?"""


# --- the command --------------------------------------------------------------------------


def chunks(name: str, seed: int = 0) -> Iterator[np.ndarray]:
    """The bytes of a stream, a chunk at a time."""
    stream = (STREAMS | WEAK | ROUNDS)[name]
    for number in itertools.count():
        key = jax.random.key(seed + number // CHUNKS)
        bits = np.asarray(stream(key, np.int32(number % CHUNKS)))
        packed = np.packbits(bits) if bits.dtype == bool else np.ascontiguousarray(bits)
        yield packed.reshape(-1).view(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stream", choices=[*STREAMS, *WEAK, *ROUNDS])
    parser.add_argument("--seed", type=int, default=0, help="seed of the key")
    parser.add_argument("--bytes", type=int, default=None, help="stop after as many bytes")
    arguments = parser.parse_args()
    written = 0
    try:
        for part in chunks(arguments.stream, arguments.seed):
            if arguments.bytes is not None:
                part = part[: arguments.bytes - written]
            sys.stdout.buffer.write(part)
            written += len(part)
            if written == arguments.bytes:
                break
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{written} bytes written", file=sys.stderr)


if __name__ == "__main__":
    main()
