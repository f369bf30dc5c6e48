"""One of two processes is killed: the other ends with an error, and leaves only whole checkpoints.

The processes run this file. They share every step, and Orbax writes every checkpoint in both.
"""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import example_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout

pytestmark = pytest.mark.long

HEARTBEAT = 10
"""Seconds after which the coordinator takes a process for lost. The default of JAX is 100."""
ENDS_WITHIN = 120
"""Seconds, of which an idle machine needs 12 to 20."""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_lost_the_other_ends_with_an_error_and_without_half_a_checkpoint(
    killed, seed, tmp_path
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    paths = [str(pathlib.Path(__file__).parents[1]), inherited.get("PYTHONPATH", "")]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    logs = [tmp_path / f"log{number}.txt" for number in range(2)]
    processes = []
    try:
        for number, log in enumerate(logs):
            command = [sys.executable, __file__, str(number), address, str(tmp_path)]
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command, env=inherited | settings, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        while "saved 3 " not in logs[0].read_text():
            assert all(process.poll() is None for process in processes), logs[0].read_text()
            time.sleep(0.05)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        processes[killed].send_signal(signal.SIGKILL)
        survivor = processes[1 - killed]
        assert survivor.wait(ENDS_WITHIN) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    saved = {}
    for log in logs:
        saved |= dict(re.findall(r"^saved (\d+) (.*)$", log.read_text(), re.MULTILINE))
    step, weights = newest(tmp_path)
    assert step >= max(map(int, saved))
    # The last one may be whole though nobody lived to report it.
    assert step <= max(map(int, saved)) + 1
    if str(step) in saved:
        assert weights == saved[str(step)]


def newest(folder):
    """The newest checkpoint, read and checked as the example does on its start."""
    command = [sys.executable, __file__, "newest", str(folder)]
    paths = [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = example_runs.environment(PYTHONPATH=os.pathsep.join(paths))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "damaged" not in result.stderr
    step, weights = result.stdout.strip().split(" ", 1)
    return int(step), weights


def print_newest(folder):
    checkpoints = example_runs.load("_checkpoints")
    with checkpoints.open_directory(pathlib.Path(folder) / "checkpoints") as manager:
        like = {"weights": np.zeros(8, np.float32)}
        step, state = checkpoints.load_newest(manager, like, {})
    print(step, text_of(state))


def text_of(state):
    return np.asarray(state["weights"]).tobytes().hex()


def work(number, address, folder):
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=int(number),
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    checkpoints = example_runs.load("_checkpoints")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(values, spec):
        return jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, spec), lambda index: values[index]
        )

    @jax.jit
    def take_step(step, weights, x):
        key = jax.random.fold_in(jax.random.key(0), step)
        y = jdropout.dropout(key, x * weights, 0.5).mean(axis=0)
        return jax.lax.with_sharding_constraint(weights + 0.01 * y, NamedSharding(mesh, P()))

    x = put(np.ones((16, 8), np.float32), P("data"))
    state = {"weights": put(np.ones(8, np.float32), P())}
    with checkpoints.open_directory(pathlib.Path(folder) / "checkpoints") as manager:
        for step in range(1, 100_000):
            state = {"weights": take_step(jnp.int32(step), state["weights"], x)}
            checkpoints.save(manager, step, state, {})
            print("saved", step, text_of(state), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "newest":
        print_newest(sys.argv[2])
    else:
        work(*sys.argv[1:])
