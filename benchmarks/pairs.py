"""Correlations between any two elements of masks that a training uses together.

    python benchmarks/pairs.py            # about five minutes on one core
    python benchmarks/pairs.py --only lanes --only steps

For each kind of pair there are some places, whose pairs are all looked at, and the bits of each in
many samples. A perfect generator has a correlation above the bound of a row with probability 1e-6,
by Bonferroni over the row's pairs. The table goes to results/randomness-pairs.md.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import jdropout
from jdropout.keys import at_site, in_batch, site_key, step_key, stratified_key

RESULT = pathlib.Path(__file__).parent / "results" / "randomness-pairs.md"
FALSE_ALARM = 1e-6
RATES = (0.5, 0.1)
ROOT = jax.random.key(20261129)
PARTS = 16
"""Parts of the samples, each with a key of its own."""

PLACES, SIDE = 512, 128
"""Places whose pairs are all looked at, and the side of a square of samples in one part."""

Bits = Callable[[float, jax.Array], jax.Array]
"""The bits of all places (rows) in the samples of a part (columns), by rate and part's key."""


# --- places of one mask -------------------------------------------------------------------


def lanes(rate: float, key: jax.Array) -> jax.Array:
    return jdropout.keep_mask(key, rate, (4, 1 << 18))


def row(rate: float, key: jax.Array) -> jax.Array:
    return jdropout.keep_mask(key, rate, (SIDE * SIDE, PLACES)).T


def column(rate: float, key: jax.Array) -> jax.Array:
    return jdropout.keep_mask(key, rate, (PLACES, SIDE * SIDE))


def tile(rate: float, key: jax.Array) -> jax.Array:
    mask = jdropout.keep_mask(key, rate, (16 * SIDE, 32 * SIDE))
    return mask.reshape(SIDE, 16, SIDE, 32).transpose(1, 3, 0, 2).reshape(PLACES, -1)


def distant(rate: float, key: jax.Array) -> jax.Array:
    place = jnp.arange(PLACES)

    def bit(key: jax.Array, *start: jax.Array) -> jax.Array:
        return jdropout.keep_mask(key, rate, (1, 1), start=start, global_shape=(4096, 4096))[0, 0]

    of_place = jax.vmap(bit, (0, None, None))
    keys = jax.random.split(key, SIDE * SIDE)
    return jax.vmap(of_place, (None, 0, 0))(keys, place * 2917 % 4096, place * 1223 % 4096)


def examples(rate: float, key: jax.Array) -> jax.Array:
    def microbatch(first: jax.Array) -> jax.Array:
        part = in_batch(key, first, PLACES)
        return jdropout.keep_mask(part, rate, (PLACES // 8, SIDE, SIDE))

    return jax.vmap(microbatch)(jnp.arange(8) * (PLACES // 8)).reshape(PLACES, -1)


def heads(rate: float, key: jax.Array) -> jax.Array:
    return jdropout.keep_mask(key, rate, (8, 64, SIDE, SIDE)).reshape(PLACES, -1)


def queries(rate: float, key: jax.Array) -> jax.Array:
    mask = jdropout.keep_mask(key, rate, (8, 16, PLACES, SIDE))
    return mask.transpose(2, 0, 1, 3).reshape(PLACES, -1)


def keys(rate: float, key: jax.Array) -> jax.Array:
    mask = jdropout.keep_mask(key, rate, (8, 16, SIDE, PLACES))
    return mask.transpose(3, 0, 1, 2).reshape(PLACES, -1)


def stratum(rate: float, key: jax.Array) -> jax.Array:
    return row(rate, stratified_key(key, 3, 10))


# --- the same element under many keys -----------------------------------------------------


def under_keys(keys_of: Callable[[jax.Array, jax.Array], jax.Array]) -> Bits:
    """Bits of the keys that `keys_of` makes of a part's key and the numbers of the places."""

    @functools.wraps(keys_of)
    def bits(rate: float, key: jax.Array) -> jax.Array:
        mask = jax.vmap(lambda key: jdropout.keep_mask(key, rate, (SIDE, SIDE)))
        return mask(keys_of(key, jnp.arange(PLACES))).reshape(PLACES, -1)

    return bits


@under_keys
def steps(key: jax.Array, place: jax.Array) -> jax.Array:
    return jax.vmap(lambda step: site_key(key, step=step, site="hidden"))(place)


@under_keys
def microbatches(key: jax.Array, place: jax.Array) -> jax.Array:
    of_number = functools.partial(site_key, key, step=1000, site="hidden")
    return jax.vmap(lambda number: of_number(microbatch=number))(place)


@under_keys
def sites(key: jax.Array, place: jax.Array) -> jax.Array:
    step = step_key(key, step=1000)
    named = jnp.stack([at_site(step, f"layer_{number}") for number in range(64)])
    return jax.vmap(jax.vmap(at_site, (None, 0)), (0, None))(named, place[:8]).reshape(-1)


@under_keys
def children(key: jax.Array, place: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, place)


@under_keys
def seeds(key: jax.Array, place: jax.Array) -> jax.Array:
    first = jax.random.key_data(key)[-1]
    return jax.vmap(jax.random.key)(first + place.astype(jnp.uint32))


@under_keys
def monte_carlo(key: jax.Array, place: jax.Array) -> jax.Array:
    return jax.vmap(lambda sample: at_site(at_site(key, sample), "hidden"))(place)


KINDS: dict[Bits, str] = {
    lanes: "the 4 lanes of a cipher block",
    row: "a row",
    column: "a column",
    tile: "neighbouring blocks: 16 rows of 32 columns",
    distant: "a layer of 4096 x 4096: elements all over it, over keys",
    examples: "examples of a batch, in 8 microbatches by `in_batch`",
    heads: "attention (8, 64, 128, 128): heads of all examples",
    queries: "attention (8, 16, 512, 128): queries",
    keys: "attention (8, 16, 128, 512): keys",
    steps: "consecutive steps",
    microbatches: "microbatches with keys of their own",
    sites: "sites of a step: 64 names, 8 indices below each",
    children: "`fold_in(key, i)`, which is `split(key, n)[i]`",
    seeds: "consecutive seeds",
    monte_carlo: "independent samples of `mc_predict`",
    stratum: "a row, in one of 10 coupled samples",
}


# --- correlations -------------------------------------------------------------------------


class Correlations(NamedTuple):
    """The largest of all pairs' correlations, without a sign."""

    pairs: int
    samples: int
    largest: float
    bound: float
    control: float
    """The largest one if the last place follows its neighbour in one sample of 32."""


def correlations(kind: Bits, rate: float, parts: int = PARTS) -> Correlations:
    keep = 1 - jdropout.effective_rate(rate)
    bits = jax.jit(kind, static_argnums=0)
    part_keys = [at_site(ROOT, (kind.__name__, part)) for part in range(parts)]
    both = with_control = np.float64(0)
    n = 0
    for key in part_keys:
        kept = np.array(bits(rate, key))
        both = both + products(kept)
        kept[-1, ::32] = kept[-2, ::32]
        with_control = with_control + products(kept)
        n += kept.shape[1]
    largest, control = (largest_of(counts, n, keep) for counts in (both, with_control))
    pairs = len(both) * (len(both) - 1) // 2
    bound = float(stats.norm.isf(FALSE_ALARM / 2 / pairs)) / n**0.5
    return Correlations(pairs, n, largest, bound, control)


def products(kept: np.ndarray) -> np.ndarray:
    """How often two places are both kept; the sums of float32 are exact, below 2^24."""
    assert kept.shape[1] <= 1 << 24
    ones = kept.astype(np.float32)
    return (ones @ ones.T).astype(np.float64)


def largest_of(both: np.ndarray, n: int, keep: float) -> float:
    """From counts; products of centred bits have the mean 0 and a known standard deviation."""
    single = np.diag(both)
    covariance = both / n - keep * (single[:, None] + single) / n + keep**2
    pairs = covariance[np.triu_indices(len(both), k=1)] / (keep * (1 - keep))
    return float(abs(pairs).max())


HEADER = """# Correlations of pairs

`python benchmarks/pairs.py`

All pairs of 512 places (of 4 in the first row). A perfect generator has a correlation above the
bound in a given row with probability 1e-6. In the control the last place follows its neighbour in
one sample of 32, which makes a correlation of about 1/32.

| pairs of | rate | pairs | samples of each | largest correlation | bound | control |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [kind.__name__ for kind in KINDS]
    parser.add_argument("--only", action="append", choices=names, help="a kind of pair")
    only = parser.parse_args().only or names
    lines = []
    for kind, label in KINDS.items():
        for rate in RATES if kind.__name__ in only else ():
            found = correlations(kind, rate)
            assert found.control > found.bound
            largest = (
                f"{found.largest:.5f}"
                if found.largest < found.bound
                else f"**{found.largest:.5f}**"
            )
            numbers = f"{found.pairs:,} | {found.samples:,} | {largest}"
            lines.append(
                f"| {label} | {rate} | {numbers} | {found.bound:.5f} | {found.control:.5f} |"
            )
            print(lines[-1], flush=True)
    if only == names:
        RESULT.write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
