"""Two processes with four devices each: the masks, bit for bit, of one process with one device.

The processes run this file (at its end) and find each other on the loopback address. They write
the parts of every result that their own devices hold; the tests put the parts together.
"""

import functools
import itertools
import pathlib
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout
from jdropout.keys import in_batch

SEED = 20140614
RATE = 0.3
SHAPE = (16, 24, 8)
SPECS = {
    "batch": P(("a", "b")),
    "sequence": P(None, ("a", "b")),  # 3 rows a device
    "features": P(None, None, ("a", "b")),
    "batch and sequence": P("a", "b"),
    "features and sequence": P(None, "b", "a"),
}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}
STEPS = 4
WIDTH = 16
SAMPLES = 24


def make_inputs():
    """Without JAX's random numbers: every process makes the same."""
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal(SHAPE, np.float32),
        "y_bar": generator.standard_normal(SHAPE, np.float32),
        "images": generator.standard_normal((SAMPLES, WIDTH), np.float32),
        "targets": generator.standard_normal((SAMPLES, 1), np.float32),
        "weights": generator.standard_normal((WIDTH, WIDTH), np.float32) / 4,
    }


def both_passes(dropout, key, x, y_bar):
    y, pullback = jax.vjp(functools.partial(dropout, key), x)
    return {"value": y, "gradient": pullback(y_bar)[0], "mask": y != 0}


def train(key, inputs, put, microbatches):
    """Some steps of gradient descent; returns their losses and masks, and the last weights."""

    def cut(x):
        return put(x.reshape(microbatches, -1, *x.shape[1:]), P(None, ("a", "b")))

    images, targets = cut(inputs["images"]), cut(inputs["targets"])
    firsts = SAMPLES // microbatches * jnp.arange(microbatches)
    weights = put(inputs["weights"], P())
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss(weights, step, images, targets):
        def of_part(first, images, targets):
            hidden = jax.nn.sigmoid(images @ weights)  # never 0: what is 0 afterwards was dropped
            part_key = in_batch(jax.random.fold_in(key, step), first, SAMPLES)
            hidden = jdropout.dropout(part_key, hidden, RATE)
            return jnp.mean((hidden.sum(axis=1, keepdims=True) - targets) ** 2), hidden != 0

        losses, masks = jax.lax.map(lambda part: of_part(*part), (firsts, images, targets))
        return losses.mean(), masks

    @jax.jit
    def take_steps(weights, *data):
        def take_step(carry, step):
            weights, state = carry
            values, gradient = jax.value_and_grad(loss, has_aux=True)(weights, step, *data)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(weights, updates), state), values

        carry = weights, optimizer.init(weights)
        (weights, _), (losses, masks) = jax.lax.scan(take_step, carry, jnp.arange(STEPS))
        return {"losses": losses, "masks": masks, "weights": weights}

    return take_steps(weights, images, targets)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the two processes wrote: for every result a list of (slices, values)."""
    folder = tmp_path_factory.mktemp("processes")
    processes.run(__file__, count=2, devices=4, folder=folder)
    found = {}
    for number in range(2):
        with np.load(folder / f"{number}.npz") as file:
            for name, values in file.items():
                result, *bounds = name.split(";")
                slices = tuple(slice(*map(int, bound.split(":"))) for bound in bounds)
                found.setdefault(result, []).append((slices, values))
    return found


def assemble(parts):
    """The whole array; parts that overlap, as those of a replicated array do, must agree."""
    shape = np.max([[s.stop for s in slices] for slices, _ in parts], axis=0)
    whole, seen = np.zeros(shape, parts[0][1].dtype), np.zeros(shape, bool)
    for slices, values in parts:
        assert (~seen[slices] | (whole[slices] == values)).all()
        whole[slices], seen[slices] = values, True
    assert seen.all()
    return whole


def test_two_processes_give_the_masks_of_one_in_every_mode_and_sharding(parts):
    inputs = make_inputs()
    drop = functools.partial(jdropout.dropout, rate=RATE)
    passes = jax.jit(functools.partial(both_passes, drop))
    expected = passes(jax.random.key(SEED), inputs["x"], inputs["y_bar"])
    assert (expected["mask"] == jdropout.keep_mask(jax.random.key(SEED), RATE, SHAPE)).all()
    for mode, name, result in itertools.product(MODES, SPECS, expected):
        label = f"{mode} {name} {result}"
        assert len(parts[label]) == 8
        np.testing.assert_array_equal(assemble(parts[label]), expected[result], label)


def test_microbatches_in_two_processes_have_the_masks_of_one_batch_and_its_losses_to_rounding(
    parts,
):
    keys = jnp.stack([jax.random.key(SEED), jax.random.key(SEED + 1)])
    both = jax.vmap(lambda key: train(key, make_inputs(), lambda x, spec: x, 1))(keys)
    expected, other = ({name: values[i] for name, values in both.items()} for i in range(2))
    ours = {result: assemble(parts[f"train {result}"]) for result in expected}
    masks = ours["masks"].reshape(expected["masks"].shape)
    np.testing.assert_array_equal(masks, expected["masks"])
    # The gradient's sum over the samples is taken in another order: 2^-24 for each addition.
    np.testing.assert_allclose(ours["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(ours["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    assert np.ptp(expected["losses"]) > 0.1  # it does learn
    assert abs(other["losses"] - expected["losses"]).max() > 1e-2  # the control: other masks


def test_a_process_that_fails_ends_the_others_and_shows_what_all_printed(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "print('this is process', sys.argv[1], flush=True)\n"
        "time.sleep(600 if sys.argv[1] == '0' or 'hang' in sys.argv[4] else 0.5)\n"
        "sys.exit('this failed')\n"
    )
    with pytest.raises(AssertionError, match="process 1 ended with code 1") as error:
        processes.run(script, count=2, devices=1, folder=tmp_path)
    for text in ("this is process 0", "this is process 1", "this failed"):
        assert text in str(error.value)

    monkeypatch.setattr(processes, "TIMEOUT", 1)
    (tmp_path / "hang").mkdir()
    with pytest.raises(AssertionError, match="did not end within 1 seconds"):
        processes.run(script, count=2, devices=1, folder=tmp_path / "hang")


def test_a_port_that_is_taken_is_replaced(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import processes; processes.join()\n")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    free_port = processes._free_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(processes, "_free_port", lambda: next(ports))
        processes.run(script, count=1, devices=1, folder=tmp_path)
    assert next(ports, None) is None


def work():
    """What each of the two processes does."""
    number, folder = processes.join()
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    inputs, key = make_inputs(), jax.random.key(SEED)
    drop = functools.partial(jdropout.dropout, rate=RATE)
    results = {}

    def put(mesh):
        return lambda x, spec: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )

    for mode, axis_type in MODES.items():
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)

        @jax.jit
        def in_every_sharding(key, placed, mode=mode, mesh=mesh):
            found = {}
            for name, spec in SPECS.items():
                function = in_parts(drop, mesh, spec) if mode == "manual" else drop
                for result, array in both_passes(function, key, *placed[name]).items():
                    found[f"{mode} {name} {result}"] = array
            return found

        with jax.set_mesh(mesh):
            placed = {
                name: [put(mesh)(inputs[x], spec) for x in ("x", "y_bar")]
                for name, spec in SPECS.items()
            }
            results |= in_every_sharding(key, placed)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for result, array in train(key, inputs, put(mesh), microbatches=3).items():
        results[f"train {result}"] = array

    parts = {}
    for name, array in results.items():
        for shard in array.addressable_shards:
            bounds = [s.indices(size)[:2] for s, size in zip(shard.index, array.shape, strict=True)]
            place = ";".join([name, *(f"{start}:{stop}" for start, stop in bounds)])
            parts[place] = np.asarray(shard.data)
    np.savez(folder / f"{number}.npz", **parts)
    jax.distributed.shutdown()


def in_parts(function, mesh, spec):
    """The function in manual mode: every device tells where its part begins."""

    def local(key, x):
        names = [*spec, *[None] * (x.ndim - len(spec))]
        start = [
            0 if name is None else jax.lax.axis_index(name) * size
            for name, size in zip(names, x.shape, strict=True)
        ]
        return function(key, x, start=start, global_shape=SHAPE)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), spec), out_specs=spec)


if __name__ == "__main__":
    sys.exit(work())
