"""`audit` of programs over several devices."""

import functools

import example_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import DROPOUTS, GUISES, OURS, RATE, assert_found, gradient, in_turn
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdropout
from jdropout.keys import site_key

WHOLE, PARTS = P(), P("data")


def in_parts(function, specs=(WHOLE, PARTS), out=PARTS, **options):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, **options)


@pytest.fixture(params=["ours", "by hand", "custom_vjp"])
def drop(request):
    return DROPOUTS[request.param]


@pytest.fixture
def x():
    return np.ones((8, 16), np.float32)


@pytest.mark.parametrize("name", ["ours", "by hand", "custom_vjp"])
def test_a_reused_key_is_found_under_shard_map(name, key, x):
    drop = DROPOUTS[name]

    def wrap(function):
        return in_parts(lambda k, x: function(jax.random.fold_in(k, lax.axis_index("data")), x))

    def reused(key, x):
        return drop(key, jnp.sin(drop(key, x)))

    def repaired(key, x):
        first, second = jax.random.split(key)
        return drop(first, jnp.sin(drop(second, x)))

    assert_found([("key-reused", (0, 1))], 2, wrap(reused), key, x)
    assert_found([], 2, wrap(repaired), key, x)


def test_keys_that_meet_in_value_are_found_under_shard_map(drop, key, x):
    def meeting(key, x):
        return drop(jax.random.fold_in(key, 0), drop(jax.random.split(key)[0], x))

    def apart(key, x):
        return drop(site_key(key, step=0, site="a"), drop(site_key(key, step=0, site=0), x))

    copied = functools.partial(in_parts, specs=(P(), P()), out=P())
    assert_found([("same-mask", (0, 1))], 2, copied(meeting), key, x)
    assert_found([], 2, copied(apart), key, x)


@pytest.mark.parametrize("name", ["ours", "by hand"])
def test_a_key_that_is_made_in_the_step_is_found_under_shard_map(name, key, x):
    drop, fixed = DROPOUTS[name], jax.random.key(7)
    expected = [("shared-over-devices", (0,)), ("key-independent-of-step", (0,))]
    for make in (lambda: fixed, lambda: jax.random.key(7), lambda: jax.random.PRNGKey(7)):
        assert_found(expected, 1, in_parts(lambda key, x, make=make: drop(make(), x)), key, x)


@pytest.mark.parametrize(
    ("guise", "name", "check_vma"),
    in_turn(["plain", "jit of grad of jit"], DROPOUTS, [True, False]),
)
def test_a_mask_that_devices_share_is_found(guise, name, check_vma, key, x):
    drop, wrap = DROPOUTS[name], GUISES[guise]
    part = functools.partial(in_parts, check_vma=check_vma)
    found = [("shared-over-devices", (0,))]
    report = assert_found(found, 1, wrap(part(drop)), key, x)
    assert "'data'" in report.findings[0].message

    def by_axis(axis):
        return lambda key, x: drop(jax.random.fold_in(key, lax.axis_index(axis)), x)

    assert_found([], 1, wrap(part(by_axis("data"))), key, x)
    # Another axis of the mesh does not help.
    both = part(by_axis("model"), out=P(("data", "model")))
    assert_found(found, 1, both if name == "custom_vjp" else wrap(both), key, x)
    own = part(lambda keys, x: drop(keys[0], x), specs=(P("data"), P("data")))
    assert_found([], 1, wrap(lambda k, x: own(jax.random.split(k, 4), x)), key, x)


def test_devices_may_share_the_mask_of_what_they_share(drop, key, x):
    summed = in_parts(lambda key, x: drop(key, lax.psum(x, "data")), out=P())
    assert_found([], 1, summed, key, x)
    copied = in_parts(drop, specs=(P(), P()), out=P())
    assert_found([], 1, copied, key, x)

    def after(key, x):
        return drop(key, in_parts(jnp.sin, specs=(P("data"),))(x))

    assert_found([], 1, after, key, x)


def test_a_part_of_the_whole_mask_is_clean(key, x):
    def part(key, x):
        start = (lax.axis_index("data") * 2, 0)
        return jdropout.dropout(key, x, RATE, start=start, global_shape=(8, 16))

    assert_found([], 1, in_parts(part), key, x)
    assert_found([], 1, jax.jit(gradient(in_parts(part))), key, x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_are_audited_like_others(axis_type, drop, key, x):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        # A mask that is drawn by hand has no sharding, which must be the array's in explicit mode.
        spec = P("data", "model") if drop is OURS or axis_type == AxisType.Auto else P()
        x = jax.device_put(x, jax.NamedSharding(mesh, spec))
        step = jax.jit(gradient(lambda key, x: drop(key, drop(key, x))))
        assert_found([("key-reused", (0, 1))], 2, step, key, x)
        clean = jax.jit(gradient(lambda k, x: drop(jax.random.fold_in(k, 1), drop(k, x))))
        assert_found([], 2, clean, key, x)


def test_pmap_is_audited(drop, key, x):
    assert_found([("shared-over-devices", (0,))], 1, jax.pmap(drop, in_axes=(None, 0)), key, x)
    assert_found([], 1, jax.pmap(drop), jax.random.split(key, 8), x)


def test_ring_attention_is_clean():
    ring = example_runs.load("ring_attention")
    mesh = jax.make_mesh((8,), ("ring",), axis_types=(AxisType.Auto,))
    part = P(None, "ring")

    def attend(query, key, value, dropout_key):
        return jax.shard_map(
            lambda *inputs: ring.ring_attention(*inputs, dropout_key=dropout_key, devices=8),
            mesh=mesh,
            in_specs=(part,) * 3,
            out_specs=part,
        )(query, key, value)

    q = jnp.ones((1, 64, 2, 8))
    # Every round has its own part of the mask of one key: that it is one key is on purpose.
    report = jdropout.audit(jax.grad(lambda *args: attend(*args).sum()), q, q, q, jax.random.key(0))
    assert len(report.sites) == 8
    report.assert_clean()
