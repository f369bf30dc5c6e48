"""Attention on eight devices: the numbers and the mask of one device, and few collectives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import (
    assert_close,
    assert_reveals,
    attention,
    both_passes,
    dense_results,
    equal_probabilities,
    multiplier,
    named,
    only,
    operands,
    positions_allowed,
    shape_of,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jdropout import by_position

COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
DEVICES = {"a": 2, "b": 4}
PLACES = {
    "batch and heads": (P("a", None, "b"), P("a", None, "b"), (8, 8)),
    "batch and queries": (P("a", "b"), P("a"), (16, 8)),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def collectives(compiled):
    """Names of the collectives, and the number of elements that they bring together."""
    found = {}
    for line in compiled.as_text().splitlines():
        if match := re.search(COLLECTIVE, line):
            shapes = re.findall(r"\[([0-9,]*)\]", line[: match.start()])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            found[match.group(1)] = found.get(match.group(1), 0) + sum(sizes)
    return found


@pytest.mark.parametrize(
    ("place", "axis_type"),
    [
        ("batch and heads", EXPLICIT),
        ("batch and queries", AUTO),
        ("batch and queries", EXPLICIT),
    ],
    ids=str,
)
def test_every_sharding_gives_the_same_attention_and_mask(place, axis_type, key):
    query_spec, key_spec, block_sizes = PLACES[place]
    sizes = dict(b=4, t=16, s=16, n=4, k=4, h=4, v=16)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    equal, equal_bar = equal_probabilities(arrays)
    allowed, multiplied = positions_allowed(shape, is_causal=True), multiplier(key, shape)
    (expected, _), gradients = dense_results(
        arrays, (output_bar, None), allowed=allowed, multiplied=multiplied
    )

    mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(axis_type,) * 2)
    specs = named(query_spec, key_spec, key_spec)
    placements = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    with jax.set_mesh(mesh):
        passes = both_passes(attention(key, is_causal=True, block_sizes=block_sizes))
        placed, placed_bar = jax.device_put(
            (named(*arrays), output_bar), (placements, placements["query"])
        )
        compiled = passes.lower(placed, placed_bar).compile()
        ours = compiled(placed, placed_bar)
        y, revealed = compiled(
            *jax.device_put((named(*equal), equal_bar), (placements, placements["query"]))
        )
    assert_close(ours, (expected, only(ours[1], gradients)))
    assert_reveals(y, revealed["value"], (multiplied > 0) & allowed)
    assert y.sharding.is_equivalent_to(placements["query"], 4)
    for name, gradient in revealed.items():
        assert gradient.sharding.is_equivalent_to(placements[name], 4)
    found = collectives(compiled)
    if place == "batch and queries":  # the gradients of what every device has whole are summed
        assert 0 < found.pop("all-reduce") <= (arrays[1].size + arrays[2].size) // DEVICES["a"]
    assert found == {}


def test_explicitly_sharded_queries_are_one_block_of_rows(key):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(EXPLICIT,))
    with jax.set_mesh(mesh):
        query = jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32, sharding=P(None, "d"))
        whole = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32, sharding=P())
        compiled = jax.jit(attention(key, block_sizes=None)).lower(query, whole, whole).compile()
    assert collectives(compiled) == {}


def conditional_collectives(jaxpr, conditional=False):
    """The primitives in the branches of a condition that wait for other devices."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if conditional and re.match("psum|pm|ppermute|all_|reduce_scatter", name):
            found.append(name)
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for x in inner:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                found += conditional_collectives(x, conditional or name == "cond")
    return found


# Axes of the mask by the axes of the mesh, and the specs of query, key and value, and output.
BATCH_AND_HEADS = P("a", None, "b")
SPLITS = {
    "batch and heads": ({0: "a", 1: "b"}, BATCH_AND_HEADS, BATCH_AND_HEADS, BATCH_AND_HEADS),
    "queries": ({2: "b"}, P(None, "b"), P(), P(None, "b")),
    "keys": ({3: "b"}, P(), P(None, "b"), P()),
}


def merged(output, residual):
    """The attention to all keys, from that of every device to its own."""
    weights = jnp.exp(residual - lax.pmax(lax.stop_gradient(residual), "b"))
    return lax.psum(output * weights[..., None], "b") / lax.psum(weights, "b")[..., None]


@pytest.mark.parametrize(
    ("split", "check_vma"),
    [("batch and heads", True), ("queries", False), ("keys", True)],
    ids=str,
)
def test_shard_map_with_positions_equals_the_whole(split, check_vma, key):
    split_axes, query_spec, key_spec, output_spec = SPLITS[split]
    sizes = dict(b=8, t=16, s=16, n=8, k=8, h=4, v=4)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    ours = attention(
        key, is_causal=True, block_sizes=(4, 1), global_shape=shape, return_residual=True
    )

    def local(query, key, value, scale):
        start = [0, 0, 0, 0]
        for axis, name in split_axes.items():
            start[axis] = lax.axis_index(name) * (shape[axis] // DEVICES[name])
        output, residual = ours(query, key, value, scale=scale, start=start)
        return merged(output, residual) if split == "keys" else output

    sharded = jax.shard_map(
        local,
        mesh=jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(AUTO,) * 2),
        in_specs=(query_spec, key_spec, key_spec, P()),
        out_specs=output_spec,
        check_vma=check_vma,
    )
    passes = both_passes(lambda query, key, value, scale: sharded(query, key, value, scale))
    arguments = named(*arrays, scale=np.float32(0.4))
    traced = passes.trace(arguments, output_bar)
    assert "cond" in str(traced.jaxpr)
    assert conditional_collectives(traced.jaxpr) == []  # a device would wait for ever
    (y, _), gradients = dense_results(
        arrays,
        (output_bar, None),
        allowed=positions_allowed(shape, is_causal=True),
        multiplied=multiplier(key, shape),
        scale=0.4,
    )
    ours = passes(arguments, output_bar)
    assert_close(ours, (y, only(ours[1], gradients)))


# --- segments and functions of positions --------------------------------------------------


def bias_of(slopes):
    return by_position.PositionFunction(falling, slopes)


def falling(query, key, head, slopes):
    return slopes[head] * jnp.cos(jnp.float32(query - key))


def in_stripes(query, key, head):
    return (query + 2 * key + head) % 3 > 0


def expected_in_documents(arrays, output_bar, slopes, ids, key, aligned=0):
    """Output and gradients of the attention below, dense."""
    (b, t, n, _), s = arrays[0].shape, arrays[1].shape[1]
    shape = (b, n, t, s)
    query, keys, head = np.arange(t)[:, None], np.arange(s), np.arange(n)[:, None, None]
    waves = np.cos(np.float32(query - keys))
    allowed = positions_allowed(shape, is_causal=True, query_segment_ids=ids) & in_stripes(
        query, keys, head
    )
    (y, _), gradients = dense_results(
        arrays,
        (output_bar, None),
        allowed=allowed,
        multiplied=multiplier(key, shape),
        bias=np.broadcast_to(slopes[:, None, None] * waves, shape),
        soft_cap=2.0,
    )
    gradients["slopes"] = (gradients["bias"] * waves).sum((0, 2, 3))
    return y, gradients


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
def test_segments_and_functions_send_a_table_of_blocks_at_most(axis_type, key):
    sizes = dict(b=4, t=16, s=16, n=4, k=4, h=4, v=4)
    arrays, (output_bar, _) = operands(**sizes)
    slopes = np.linspace(0.1, 0.4, 4, dtype=np.float32)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (4, 16), dtype=np.int32))
    expected = expected_in_documents(arrays, output_bar, slopes, ids, key)
    mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(axis_type,) * 2)
    place = functools.partial(NamedSharding, mesh)
    with jax.set_mesh(mesh):

        def run(slopes, ids, **arguments):
            options = dict(is_causal=True, logits_soft_cap=2.0, block_sizes=(8, 4))
            return attention(
                key, query_segment_ids=ids, bias_fn=bias_of(slopes), mask_fn=in_stripes, **options
            )(**arguments)

        passes = both_passes(run)
        spec = place(BATCH_AND_HEADS)
        arguments = jax.device_put(named(*arrays), spec)
        arguments["slopes"] = jax.device_put(slopes, place(P()))
        bar = jax.device_put(output_bar, spec)
        placed_ids = jax.device_put(ids, place(P("a")))
        compiled = passes.lower(arguments, bar, ids=placed_ids).compile()
        y, gradients = compiled(arguments, bar, ids=placed_ids)
    assert_close((y, gradients), (expected[0], only(gradients, expected[1])), 2e-5)
    found = collectives(compiled)
    tables, of_heads, of_examples = 2 * 2 * 4, slopes.size * 2, slopes.size
    assert found.pop("all-reduce") <= tables + of_heads + of_examples
    assert found == {}


def test_parts_of_packed_documents_in_shard_map_equal_the_whole(key):
    sizes = dict(b=2, t=16, s=16, n=2, k=2, h=4, v=4)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    slopes = np.float32([0.1, 0.3])
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (2, 16), dtype=np.int32))
    expected = expected_in_documents(arrays, output_bar, slopes, ids, key)

    def local(query, keys, value, slopes, query_ids, key_ids):
        start = (0, 0, lax.axis_index("b") * (shape[2] // DEVICES["b"]), 0)
        ours = attention(
            key,
            is_causal=True,
            logits_soft_cap=2.0,
            block_sizes=(2, 4),
            start=start,
            global_shape=shape,
            query_segment_ids=query_ids,
            key_value_segment_ids=key_ids,
            bias_fn=bias_of(slopes),
            mask_fn=in_stripes,
        )
        return ours(query, keys, value)

    sharded = jax.shard_map(
        local,
        mesh=jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(AUTO,) * 2),
        in_specs=(P(None, "b"), P(), P(), P(), P(None, "b"), P()),
        out_specs=P(None, "b"),
    )
    passes = both_passes(
        lambda query, key, value, slopes: sharded(query, key, value, slopes, ids, ids)
    )
    arguments = named(*arrays, slopes=slopes)
    assert conditional_collectives(passes.trace(arguments, output_bar).jaxpr) == []
    y, gradients = passes(arguments, output_bar)
    assert_close((y, gradients), (expected[0], only(gradients, expected[1])), 2e-5)


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_the_choice_of_blocks_by_platform_keeps_every_sharding(mode, key):
    """At this length the default blocks of the platforms differ, so that there is a choice."""
    sizes = dict(b=2, t=512, s=512, n=4, k=4, h=4, v=4)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    ours = attention(key, is_causal=True, block_sizes=None, global_shape=shape)
    expected = both_passes(functools.partial(ours, start=(0, 0, 0, 0)))(named(*arrays), output_bar)
    axis_type = EXPLICIT if mode == "explicit" else AUTO
    mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(axis_type,) * 2)

    def run(query, key, value):
        if mode != "shard_map":
            return ours(query, key, value, start=(0, 0, 0, 0))
        sharded = jax.shard_map(
            lambda *x: ours(*x, start=(lax.axis_index("a"), lax.axis_index("b"), 0, 0)),
            mesh=mesh,
            in_specs=(BATCH_AND_HEADS,) * 3,
            out_specs=BATCH_AND_HEADS,
        )
        return sharded(query, key, value)

    with jax.set_mesh(mesh):
        placed = jax.device_put((named(*arrays), output_bar), NamedSharding(mesh, BATCH_AND_HEADS))
        passes = both_passes(run)
        assert "platform_index" in str(passes.trace(*placed).jaxpr)
        compiled = passes.lower(*placed).compile()
        results = compiled(*placed)
    assert_close(results, expected, 1e-5)
    assert collectives(compiled) == {}
