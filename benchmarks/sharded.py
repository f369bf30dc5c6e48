"""Section on several devices: a data-parallel training step, and its collectives.

Eight CPU devices must be requested before JAX starts, so the section runs this file as a script in
a separate process. The devices share the machine's cores; they show the cost of the program, not of
a network between them.
"""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from common import KEY, Function, bind, compile_all, identity, libraries, normal
from harness import Plan, Row, timed_row
from jax.sharding import AxisType, NamedSharding, PartitionSpec

DEVICES = 8
BATCH, WIDTH, LAYERS = 4096, 256, 4
COLLECTIVE = r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def sharded(plan: Plan) -> Iterator[Row]:
    """Training step of an MLP with its batch on 8 CPU devices, which share the cores."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    process = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps(plan),
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    yield from pickle.loads(process.stdout)


def rows(plan: Plan) -> Iterator[Row]:
    assert jax.device_count() == DEVICES
    optimizer = optax.adamw(1e-3)
    params = [0.05 * normal((WIDTH, WIDTH))] * LAYERS
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    state = jax.device_put((params, optimizer.init(params), KEY), whole)
    arguments = (*state, jax.device_put(normal((BATCH, WIDTH)), split))

    drops = {"ours": libraries()["ours"], "flax": libraries()["flax"], "without": identity}
    functions = {name: training_step(optimizer, drop) for name, drop in drops.items()}
    steps = compile_all(functions, *arguments)
    # The way JAX made random bits before 0.5: devices cannot make theirs independently.
    with jax.threefry_partitionable(False):
        steps |= compile_all({"flax, old bits": functions["flax"]}, *arguments)

    label = {"network": f"{LAYERS} layers, {BATCH} x {WIDTH}, {DEVICES} devices"}
    columns = tuple(f"{name} / without" for name in steps if name != "without")
    yield timed_row({**label, "quantity": "time of a step"}, bind(steps, *arguments), columns, plan)
    counts = {name: len(re.findall(COLLECTIVE, step.as_text())) for name, step in steps.items()}
    cells = {column: "{} / {}".format(*map(counts.get, column.split(" / "))) for column in columns}
    yield Row({**label, "quantity": "collectives"}, cells, {"collectives": counts})


def training_step(optimizer: optax.GradientTransformation, drop: Function) -> Function:
    def loss(params: list[jax.Array], key: jax.Array, x: jax.Array) -> jax.Array:
        for weights, layer_key in zip(params, jax.random.split(key, len(params)), strict=True):
            x = drop(layer_key, jax.nn.gelu(x @ weights))
        return jnp.square(x).mean()

    def step(params: Any, state: Any, key: jax.Array, x: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, key, x)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(list(rows(pickle.load(sys.stdin.buffer)))))
