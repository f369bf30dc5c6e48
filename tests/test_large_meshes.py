"""What 4,096 devices would do, shown on a machine that has none of them.

Compilation: XLA:CPU compiles for a 64 x 64 mesh of made-up CPU devices, and nothing is run. That is
the partitioned program that every device would get, after all passes of the compiler: its local
shapes, and whether devices speak with each other in it. It is XLA's partitioner, which GPU and TPU
share; but it is the CPU's compiler behind it, and it tells nothing about speed.

Arithmetic: the blocks of the mask that these devices would make are made here, one by one, and
compared with the NumPy twin, which counts in 64-bit integers.
"""

import functools
import itertools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import processes
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout
from jdropout import _law, _threshold

ACTIVATION = (1024, 8192, 16384)  # 2^37 elements, 2^35 cipher blocks
PROBABILITIES = (512, 64, 8192, 8192)  # 2^41 and 2^39
RAGGED = (2000, 3 * 4096, 1000)  # 3 rows a device, if they are on both axes of the mesh
SIDE = 64
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}
COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
BOTH = ("a", "b")
CASES = [
    # shape, sharding, shape of a device's part
    (ACTIVATION, ("a", "b", None), (16, 128, 16384)),
    (ACTIVATION, (None, "a", "b"), (1024, 128, 256)),
    (ACTIVATION, (None, BOTH, None), (1024, 2, 16384)),
    (ACTIVATION, (None, None, BOTH), (1024, 8192, 4)),
    (PROBABILITIES, ("a", "b", None, None), (8, 1, 8192, 8192)),
    (PROBABILITIES, (None, "a", None, "b"), (512, 1, 8192, 128)),
    (PROBABILITIES, (None, None, "b", "a"), (512, 64, 128, 128)),
    (RAGGED, (None, BOTH, None), (2000, 3, 1000)),
]

# A program takes seconds to compile: every mode has one, and every case is in one of them.
COMPILED = {"auto": (0, 3, 6), "explicit": (1, 4, 7), "manual": (2, 5, 7)}


# --- compilation --------------------------------------------------------------------------


@pytest.mark.long
def test_both_passes_compile_for_4096_devices_without_a_collective(tmp_path):
    # XLA:CPU counts at most 2,048 devices in a process. It compiles for more only if it has been
    # told how processes speak with each other; so this is a process, the only one, of a cluster.
    processes.run(__file__, count=1, devices=SIDE**2, folder=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["control"]["collectives"]) == {"all-reduce"}  # a sum over the whole array
    for mode, numbers in COMPILED.items():
        parts = [list(CASES[number][2]) for number in numbers for _ in range(2)]
        expected = {"devices": SIDE**2, "parts": parts * 2, "collectives": []}  # inputs and outputs
        assert found[mode] == expected, mode


def compile_all():
    """What the only process does."""
    _, folder = processes.join()
    key = jax.random.key(0)
    found = {}
    for mode, numbers in COMPILED.items():
        mesh = jax.make_mesh((SIDE, SIDE), BOTH, axis_types=(MODES[mode],) * 2)

        def passes(key, inputs, mode=mode, mesh=mesh):
            results = []
            for number, (x, y_bar) in inputs.items():
                shape, spec, _ = CASES[number]
                drop = in_parts(mesh, P(*spec), shape) if mode == "manual" else whole
                y, pullback = jax.vjp(functools.partial(drop, key), x)
                results += [y, *pullback(y_bar)]
            return results

        inputs = {}
        for number in numbers:
            shape, spec, _ = CASES[number]
            x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
            inputs[number] = x, x
        with jax.set_mesh(mesh):
            found[mode] = describe(jax.jit(passes).lower(key, inputs).compile())
    x = jax.ShapeDtypeStruct(ACTIVATION, jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    found["control"] = describe(jax.jit(jnp.sum).lower(x).compile())
    (folder / "found.json").write_text(json.dumps(found))


def describe(compiled):
    text = compiled.as_text()
    header = text.partition("\n")[0]
    shapes = re.findall(r"f32\[([0-9,]+)\]", header)
    return {
        "devices": int(re.search(r"num_partitions=(\d+)", header)[1]),
        "parts": [[int(size) for size in shape.split(",")] for shape in shapes],
        "collectives": re.findall(COLLECTIVE, text),
    }


def whole(key, x):
    return jdropout.dropout(key, x, 0.1)


def in_parts(mesh, spec, shape):
    """Dropout in manual mode: every device tells where its part begins."""

    def local(key, x):
        start = [
            0 if names is None else jax.lax.axis_index(names) * size
            for names, size in zip(spec, x.shape, strict=True)
        ]
        return jdropout.dropout(key, x, 0.1, start=start, global_shape=shape)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), spec), out_specs=spec)


# --- arithmetic ---------------------------------------------------------------------------


def strides(shape):
    """Cipher blocks from one index, or one group of rows, to the next; in Python's integers."""
    counted = [*shape[:-2], -(-shape[-2] // 4), shape[-1]]
    return [math.prod(counted[axis + 1 :]) for axis in range(len(counted))]


def block_number(shape, position):
    position = [*position[:-2], position[-2] // 4, position[-1]]
    return sum(p * s for p, s in zip(position, strides(shape), strict=True))


def corners(spec, part, block):
    """Starts of the blocks in all corners of the parts of some devices, in the mesh's corners too.

    Args:
      spec: how the array is placed.
      part: shape of a device's part.
      block: shape of the blocks.
    """
    others = np.random.default_rng(0).integers(0, SIDE, (4, 2))
    for row, column in [*itertools.product([0, SIDE - 1], repeat=2), *others.tolist()]:
        index = {"a": row, "b": column, BOTH: row * SIDE + column, None: 0}
        begin = [index[names] * size for names, size in zip(spec, part, strict=True)]
        ends = [
            (first, first + size - length)
            for first, size, length in zip(begin, part, block, strict=True)
        ]
        yield from itertools.product(*ends)


def twin(key, shape, start, block):
    words = np.asarray(jax.random.key_data(key))
    return law_twin.keep_mask(words, 0.5, block, start=start, whole=shape)


PLACES = [
    # number of the case, shape of a block
    (0, (1, 7, 3)),
    (2, (3, 2, 3)),  # 2 rows a device: every other part begins in the middle of a group
    (4, (2, 1, 7, 3)),
    (6, (2, 2, 9, 3)),
    (7, (2, 3, 5)),
]


@pytest.mark.parametrize(("case", "block"), PLACES, ids=str)
def test_devices_make_their_parts_of_the_twins_mask(case, block, key):
    shape, spec, part = CASES[case]
    starts = list(corners(spec, part, block))
    assert len(starts) == 8 * 2 ** len(shape)

    @jax.jit
    @jax.vmap
    def masks(start):
        return jdropout.keep_mask(key, 0.5, block, start=list(start), global_shape=shape)

    for start, mask in zip(starts, np.asarray(masks(np.array(starts, np.int32))), strict=True):
        np.testing.assert_array_equal(mask, twin(key, shape, start, block))


ACROSS = [
    # shape, and start and shape of a block that reaches across cipher block 2^32
    (ACTIVATION, (127, 8181, 16379), (2, 11, 5)),
    (PROBABILITIES, (3, 62, 8181, 8187), (2, 2, 11, 5)),
    (RAGGED, (1398, 1238, 290), (1, 11, 12)),  # here within a row
]
FAR_ENDS = [
    (ACTIVATION, (1022, 8181, 16379), (2, 11, 5)),
    (PROBABILITIES, (510, 62, 8181, 8187), (2, 2, 11, 5)),
    (RAGGED, (1998, 12277, 995), (2, 11, 5)),
    ((128, 8192, 16384), (126, 8181, 16379), (2, 11, 5)),  # 2^32 cipher blocks, and no more
]


@pytest.mark.parametrize(("shape", "start", "block"), ACROSS + FAR_ENDS, ids=str)
def test_blocks_across_2_to_the_32_and_at_the_far_end_equal_the_twin(shape, start, block, key):
    def ours(start):
        return jdropout.keep_mask(key, 0.5, block, start=start, global_shape=shape)

    expected = twin(key, shape, start, block)
    for mask in jax.jit(lambda start_traced: (ours(start), ours(start_traced)))(list(start)):
        np.testing.assert_array_equal(mask, expected)
    if (shape, start, block) in ACROSS:
        last = [first + size - 1 for first, size in zip(start, block, strict=True)]
        assert block_number(shape, start) < 2**32 < block_number(shape, last)


def test_counting_in_32_bits_is_found_out(key):
    """The control for the blocks across 2^32: without the high word they differ."""
    shape, start, block = ACROSS[0]
    layout, origin = _law.locate(shape, block, start)
    assert layout.wide
    threshold = _threshold.static_threshold(0.5, None)
    words = _law.mask_key_words(_law.key_words(key), 1)
    narrow = jax.jit(
        lambda words, origin: _law.keep(words, threshold, layout._replace(wide=False), origin)
    )(words, origin)
    expected = twin(key, shape, start, block)
    assert (narrow[0] == expected[0]).all()  # still below 2^32
    assert (narrow[1] != expected[1]).any()


@pytest.mark.parametrize("shape", [ACTIVATION, PROBABILITIES, RAGGED], ids=str)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_numbers_of_cipher_blocks_are_those_of_pythons_integers(shape, dtype):
    positions = np.random.default_rng(0).integers(0, shape, (5000, len(shape)))
    one = (1,) * len(shape)

    @jax.jit
    @jax.vmap
    def number(position):
        layout, origin = _law.locate(shape, one, list(position))
        return _law.block_index(layout, origin, jnp.zeros(one, jnp.uint32))

    high, low = (np.asarray(word).reshape(-1).tolist() for word in number(positions.astype(dtype)))
    expected = [divmod(block_number(shape, p), 2**32) for p in positions.tolist()]
    assert list(zip(high, low, strict=True)) == expected
    assert max(high) > 0


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case][:2]))
def test_no_array_of_positions_has_signed_integers(case, key):
    """Unsigned words wrap by definition, and the law carries; a signed overflow would be an error.

    The only signed numbers are scalars, in manual mode: the place of a part along one axis.
    """
    shape, spec, _ = CASES[case]
    mesh = jax.sharding.AbstractMesh((SIDE, SIDE), BOTH, axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    assert signed_types(whole, key, x) == set()
    assert signed_types(in_parts(mesh, P(*spec), shape), key, x) == {"tensor<i32>"}


def test_signed_positions_are_found_out(key):
    """The control."""
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert signed_types(lambda key, x: x + jnp.arange(8).astype(x.dtype), key, x)


def signed_types(function, key, x):
    text = jax.jit(function).trace(key, x).lower(lowering_platforms=("cpu",)).as_text()
    return set(re.findall(r"tensor<(?:\d+x)*i(?:8|16|32|64)>", text))


if __name__ == "__main__":
    sys.exit(compile_all())
