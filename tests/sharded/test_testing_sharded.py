"""`assert_sharding_invariant` accepts what no sharding changes, and rejects controls."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from planted import Planted, located

import jdropout
from jdropout.testing import (
    _explain,
    assert_sharding_invariant,
    first_difference,
    mask_fingerprint,
    record,
)

KEY = jax.random.key(2026)
WORDS = [7, 2026]


@pytest.fixture(autouse=True)
def unexplained(monkeypatch):
    """Failures are not recorded, which would compile every control twice more."""
    monkeypatch.setattr(_explain, "MOST_EQUATIONS", 0)


def fails(text):
    return pytest.raises(AssertionError, match=text)


def test_a_fingerprint_is_the_same_on_every_device():
    known = mask_fingerprint(KEY, 0.1, (37, 10))
    for device in jax.devices()[1::3]:
        with jax.default_device(device):
            assert mask_fingerprint(KEY, 0.1, (37, 10)) == known


X = np.arange(1.0, 129, dtype=np.float32).reshape(16, 8)


def square_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)


def in_pieces(key, x, positions):
    """Dropout of the rows that a device has, over whatever mesh is set."""

    def local(key, x):
        if not positions:
            return jdropout.dropout(key, x, 0.5)
        start = (lax.axis_index("a") * x.shape[0], 0)
        return jdropout.dropout(key, x, 0.5, start=start, global_shape=X.shape)

    return jax.jit(jax.shard_map(local, in_specs=(P(), P("a")), out_specs=P("a")))(key, x)


@pytest.mark.parametrize("key", [jax.random.key(0, impl="rbg"), np.array(WORDS, np.uint32)])
def test_dropout_does_not_depend_on_the_sharding(key):
    fn = jax.jit(lambda key, x: jdropout.dropout(key, x, 0.5))
    assert_sharding_invariant(fn, key, X, devices=jax.devices()[:2])


def test_dropout_does_not_depend_on_the_sharding_in_explicit_mode():
    fn = jax.jit(lambda x: jdropout.dropout(KEY, x, 0.5))
    assert_sharding_invariant(fn, X, mesh=square_mesh(AxisType.Explicit))


def test_shard_map_over_the_mesh_that_is_set_is_compared_with_one_device():
    assert_sharding_invariant(functools.partial(in_pieces, positions=True), KEY, X)
    with fails(r"with args\[1\] sharded .* over the mesh {'a': 2, 'b': 4}, result differs in \d+"):
        assert_sharding_invariant(functools.partial(in_pieces, positions=False), KEY, X)


def test_sums_are_compared_up_to_rounding_and_masks_still_are_not():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    assert_sharding_invariant(jax.jit(jnp.sum), x, rtol=1e-5)
    with fails(r"\(\): "):
        assert_sharding_invariant(jax.jit(jnp.sum), x, rtol=1e-9)
    with fails(r"depends on the sharding"):
        assert_sharding_invariant(functools.partial(in_pieces, positions=False), KEY, X, rtol=1e-5)


def recording(seen):
    def fn(*args):
        seen.append([leaf.sharding.spec for leaf in jax.tree.leaves(args)])
        return args

    return fn


def test_every_sharding_by_one_or_two_axes_is_tried_once():
    seen = []
    assert_sharding_invariant(recording(seen), X)
    a, b = "a", "b"
    expected = [P(), P(a), P(b), P(None, a), P(None, b), P((a, b)), P(None, (a, b)), P(a, b)]
    assert len(seen) == len(expected) + 1
    assert {spec for (spec,) in seen} == {*expected, P(b, a)}


def test_arguments_are_sharded_one_by_one_and_together_and_keys_never():
    seen = []
    tree = {"w": np.ones((8, 3), np.float32), "b": np.ones(3, np.float32)}
    args = (KEY, tree, X[:, 0], np.array(WORDS, np.uint32))
    assert_sharding_invariant(recording(seen), *args, devices=jax.devices()[:2])
    alone = [[P(), P(), P("b"), P(), P()], [P(), P(), P(), P("b"), P()]]
    assert seen == [[P()] * 5, *alone, [P(), P(), P("b"), P("b"), P()]]


def test_arguments_that_are_no_arrays_are_passed_on_and_donated_ones_survive():
    fn = jax.jit(lambda x, scale: x * scale, donate_argnums=0)
    x = jnp.ones((16, 8))
    assert_sharding_invariant(fn, x, 2.0, devices=jax.devices()[:2])
    assert x.sum() == 128


def test_results_are_compared_in_structure_and_keys_too():
    def structure(x):
        return [x] if len(x.sharding.device_set) == 1 else [x, x]

    def keys(x):
        return jax.random.fold_in(KEY, len(x.sharding.device_set))

    with fails(r"result\[1\] is only there not on one device"):
        assert_sharding_invariant(structure, X)
    with fails(r"result differs in 2 of 2 elements, first at \(0,\): \d+, but \d+ on one device"):
        assert_sharding_invariant(keys, X)


def test_the_sharding_under_which_a_function_breaks_is_noted():
    def fn(x):
        if len(x.sharding.device_set) > 1:
            raise RuntimeError("broken")
        return x

    with pytest.raises(RuntimeError, match="broken") as caught:
        assert_sharding_invariant(fn, X)
    assert "args[0] sharded" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((X,), dict(devices=jax.devices()[:1]), ValueError, "xla_force_host_platform_device_count"),
        ((X,), dict(mesh=Mesh(jax.devices()[:1], ("a",))), ValueError, "at least 2 devices, got 1"),
        ((X,), dict(mesh=square_mesh(), devices=jax.devices()), ValueError, "pass one"),
        ((X,), dict(mesh="a"), TypeError, "mesh must be a jax.sharding.Mesh, got str"),
        ((X,), dict(rtol=1), ValueError, "rtol must be in [0, 1), got 1"),
        ((X,), dict(rtol="x"), TypeError, "rtol must be None or a number, got 'x'"),
        ((X[:3, :3],), {}, ValueError, "that the mesh {'a': 2, 'b': 4} divides"),
        ((2.0,), {}, ValueError, "args hold no array"),
        ((KEY,), {}, ValueError, "args hold no array"),
        ((), {}, ValueError, "args hold no array"),
    ],
)
def test_what_shows_nothing_about_shardings_is_an_error(args, options, error, text):
    with pytest.raises(error) as caught:
        assert_sharding_invariant(lambda *args: args, *args, **options)
    assert text in str(caught.value)


def test_one_device_alone_is_an_error_that_says_how_to_get_more(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    with pytest.raises(ValueError, match="XLA_FLAGS=--xla_force_host_platform_device_count=8"):
        assert_sharding_invariant(lambda x: x, X)


def test_a_function_without_results_is_an_error():
    with pytest.raises(ValueError, match="fn returned no arrays"):
        assert_sharding_invariant(lambda x: None, X)


# --- recordings ---------------------------------------------------------------------------


def sharded_step(mesh, x, w):
    """Two scanned steps on every device, with a while loop whose length differs between them."""

    def local(x, w):
        def cell(carry, _):
            carry = jnp.tanh(carry @ w) + lax.axis_index("a").astype(x.dtype)
            carry = lax.while_loop(lambda c: c.sum() < 40, lambda c: c + jnp.abs(c) + 1, carry)
            return carry, lax.psum(carry.sum(), ("a", "b"))

        return lax.scan(cell, x, length=2)

    specs = dict(in_specs=(P("a"), P()), out_specs=(P(("a", "b")), P()))
    # Every device of "b" has its own part of the output.
    vary = functools.partial(lax.pcast, axis_name="b", to="varying") if pcast else pvary
    return jax.shard_map(lambda x, w: local(vary(x), w), mesh=mesh, **specs)(x, w)


pcast = hasattr(lax, "pcast")


def pvary(x):
    return lax.pvary(x, "b")


def test_faults_in_one_devices_shard_are_located():
    mesh = square_mesh()
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8), np.float32))
    step = functools.partial(sharded_step, mesh)
    planted = Planted(step, jnp.asarray(X), w, max_iterations=4)
    generator = random.Random(0)
    rows = generator.sample([row for row, spot in planted.spots.items() if spot.inside], 20)
    planted.prepare(rows)
    for row in rows:
        fault, kind = planted.choose(generator, row)
        assert kind.endswith("one device's shard")
        difference = first_difference(planted.clean, planted.record(fault))
        assert located(planted, row, difference), (planted.spots[row], str(difference))
        assert dict(difference.device).keys() == {"a", "b"}
    assert record(step, X, w, values=True, max_iterations=4) == planted.clean


def test_recordings_are_the_same_for_every_sharding():
    def fn(x, y):
        x = jax.checkpoint(jnp.sin)(x)
        return lax.scan(lambda c, row: (c + row[None], c.max()), x, y)

    def placed(x, axis_type, *spec):
        return jax.device_put(x, NamedSharding(square_mesh(axis_type), P(*spec)))

    single = record(fn, X, X)
    split = [placed(X, AxisType.Auto, *spec) for spec in (("a", "b"), (None, ("a", "b")))]
    assert record(fn, *split) == single
    with jax.set_mesh(square_mesh(AxisType.Explicit)):
        explicit = jax.device_put(X, P("a", "b"))
        both = [record(lambda x: jnp.sin(x) * 2, x) for x in (X, explicit)]
    assert first_difference(*both) is None


def test_a_failure_names_the_line_that_depends_on_the_sharding(monkeypatch):
    monkeypatch.setattr(_explain, "MOST_EQUATIONS", 1000)

    def fn(key, x):
        return in_pieces(key, x, positions=False) * 2

    with fails(r"first differs here:\nequation \d+ \(shard_map\)(.|\n)*in_pieces: return jax.jit"):
        assert_sharding_invariant(fn, KEY, jnp.asarray(X), mesh=square_mesh())
