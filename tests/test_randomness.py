"""The laws' bits under batteries of tests, and flawed bits, which the same batteries reject.

The batteries have to be installed (`benchmarks/randomness.py` says where they are from), and take
a few minutes:

    python -m pytest tests/test_randomness.py -m randomness

Without the marker this file only checks that the streams are made of the laws' bits.
"""

import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest
from law_twin import port

import jdropout

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import randomness
import stream

SEED = 3
ROOT = (0, SEED)
MANY = stream.CHUNKS


def alternating(keys):
    """16 keys in a chunk, masks of 4 x 4."""
    masks = np.array([port.keep_mask(key, 0.5, (4, 4)) for key in keys])
    return masks.reshape(2, 16, 16).transpose(0, 2, 1)


def in_order(**options):
    return port.keep_mask(ROOT, 0.5, (32, 32), global_shape=(16 * MANY, 32), **options)


def bits_of(name):
    """The bits of two small chunks, by the port to NumPy."""
    if name in ("rows", "20-rounds"):
        return in_order()
    if name == "columns":
        return port.keep_mask(ROOT, 0.5, (16, 64), global_shape=(16, 4 * MANY)).T
    if name == "strata":
        return in_order(sample=(3, 10))
    if name == "subsets":
        place = {"shape": (8,), "global_shape": (4 * MANY, 32)}
        return port.keep_indices(ROOT, 0.5, 32, groups=16, **place) % 2
    number = range(32)
    if name == "fold_in":
        return alternating(port.fold_in(ROOT, n) for n in number)
    if name == "seeds":
        return alternating((0, SEED + n) for n in number)
    if name == "steps":
        return alternating(port.site_key(ROOT, step=n, site="hidden") for n in number)
    if name == "sites":
        sites = [("block", layer, "mlp") for layer in number]
        return alternating(port.site_key(ROOT, step=0, site=site) for site in sites)
    raise AssertionError(name)


def test_streams_are_the_laws_bits(monkeypatch):
    sizes = {"ROWS": 16, "COLUMNS": 32, "KEYS": 16, "SIDE": 4, "SUBSETS": (4, 16)}
    for name, size in sizes.items():
        monkeypatch.setattr(stream, name, size)
    for name in [*stream.STREAMS, "20-rounds"]:
        made = np.concatenate([*itertools.islice(stream.chunks(name, SEED), 2)])
        if name == "uniforms":
            kept = made.view(np.uint32).reshape(32, 4) < 2**32 * 0.3
            place = {"start": (0, 0), "global_shape": (16 * MANY, 4), "precision": 32}
            expected = jdropout.keep_mask(jax.random.key(SEED), 0.7, (32, 4), **place)
            np.testing.assert_array_equal(kept, expected)
        else:
            np.testing.assert_array_equal(made, np.packbits(bits_of(name)), err_msg=name)


SHORT = [
    ("ent", 10_000_000),
    ("dieharder-short", None),
    ("practrand-short", None),
    ("smallcrush", None),
]


@pytest.mark.randomness
@pytest.mark.parametrize(("battery", "size"), SHORT, ids=lambda value: str(value))
def test_a_battery_passes_the_law_and_rejects_flaws(battery, size, tmp_path):
    """A perfect generator fails one of the four with a probability of 0.004 at most."""
    for name in ("rows", *stream.WEAK):
        log = randomness.Run(battery, name, size=size).into(tmp_path)
        found = randomness.summary(battery, log)
        assert found is not None, log
        assert found.verdict == ("fails" if name in stream.WEAK else "passes"), (name, found)
