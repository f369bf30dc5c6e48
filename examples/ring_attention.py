"""Sequence-parallel attention: queries and keys sharded, keys passed around a ring of devices.

Each device holds a part of the sequence. There are as many rounds as devices. In each round a
device attends from its queries to the keys it currently holds, then passes these keys to its
neighbour. `start` gives the position of the part in the whole attention matrix, so the dropout mask
and causality are the same as on one device that holds everything. The log-sum-exps determine the
weights of the parts. The script compares outputs and gradients with a single device.

Run it on the devices of this machine, or on eight virtual ones:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/ring_attention.py
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jdropout

RATE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024, help="default: %(default)s")
    length = parser.parse_args().length
    devices = jax.device_count()
    if length < 1 or length % devices:
        parser.error(f"--length {length}: must be a multiple of the {devices} devices")

    shape = (1, length, 4, 32)
    *keys, dropout_key = jax.random.split(jax.random.key(0), 5)
    query, key, value, cotangent = (jax.random.normal(k, shape) for k in keys)

    mesh = jax.make_mesh((devices,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
    part = P(None, "ring")
    ring = jax.shard_map(
        functools.partial(ring_attention, dropout_key=dropout_key, devices=devices),
        mesh=mesh,
        in_specs=(part, part, part),
        out_specs=part,
    )

    def alone(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jdropout.dot_product_attention(
            query, key, value, dropout_key=dropout_key, dropout_rate=RATE, is_causal=True
        )

    results = [
        jax.jit(functools.partial(output_and_gradients, f))(cotangent, query, key, value)
        for f in (ring, alone)
    ]
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    print(f"{length} positions on {devices} device(s): largest difference from one device")
    for name, ours, expected in zip(names, *results, strict=True):
        difference = jnp.abs(ours - expected).max() / jnp.abs(expected).max()
        print(f"  {name}: {difference:.1e} of the largest value")
        if not difference < 1e-5:
            raise SystemExit(f"{name} differs")


def ring_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, dropout_key: jax.Array, devices: int
) -> jax.Array:
    """Computes causal attention from this device's queries to the keys of all devices."""
    batch, size, heads, _ = query.shape
    me = jax.lax.axis_index("ring")
    neighbours = [(device, (device + 1) % devices) for device in range(devices)]
    output, total = jnp.zeros_like(query), jnp.full_like(query[..., 0], -jnp.inf)
    for round_ in range(devices):
        owner = (me - round_) % devices
        part, part_total = jdropout.dot_product_attention(
            query,
            key,
            value,
            dropout_key=dropout_key,
            dropout_rate=RATE,
            is_causal=True,
            start=(0, 0, me * size, owner * size),
            global_shape=(batch, heads, devices * size, devices * size),
            return_residual=True,
        )
        new_total = jnp.logaddexp(total, part_total)
        output = output * jnp.exp(total - new_total)[..., None]
        output += part * jnp.exp(part_total - new_total)[..., None]
        total = new_total
        if round_ < devices - 1:
            key, value = (jax.lax.ppermute(x, "ring", neighbours) for x in (key, value))
    return output


def output_and_gradients(function, cotangent, *inputs):
    output, pullback = jax.vjp(function, *inputs)
    return output, *pullback(cotangent)


if __name__ == "__main__":
    main()
