"""Starts JAX processes that find each other on the loopback address, and ends all of them."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax

TIMEOUT = 120
"""Seconds that the processes have together. They take 10 on two idle cores."""
ATTEMPTS = 3
PORT_TAKEN = "Failed to add port"  # what gRPC logs if the coordinator cannot listen


def run(script, count, devices, folder):
    """Runs ``script I ADDRESS COUNT FOLDER`` in processes I = 0, ..., count - 1.

    Each has ``devices`` CPU devices. Another process can take the free port before the
    coordinator does; only then are they started again. Whatever else fails, a process or the
    time, ends all processes at once, and the error holds what each of them printed.
    """
    for _ in range(ATTEMPTS):
        failure, logs = _attempt(script, count, devices, pathlib.Path(folder))
        if failure is None:
            return
        if PORT_TAKEN not in logs[0]:
            break
    texts = [f"--- process {i} ---\n{log}" for i, log in enumerate(logs)]
    raise AssertionError("\n".join([failure, *texts]))


def join():
    """Makes this process one of those that `run` started; returns its number and the folder."""
    number, address, count, folder = sys.argv[1:]
    jax.distributed.initialize(
        address,
        num_processes=int(count),
        process_id=int(number),
        initialization_timeout=TIMEOUT // 2,
        coordinator_bind_address=address,  # by default it listens on every interface
    )
    return int(number), pathlib.Path(folder)


def _attempt(script, count, devices, folder):
    """Returns what went wrong, or None, and what the processes printed."""
    address = f"127.0.0.1:{_free_port()}"
    # gRPC would look for the coordinator behind a proxy, and JAX warn of it.
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment = inherited | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # LLVM's: half of the time of a compilation
        "XLA_FLAGS": f"{inherited.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
    }
    paths = [folder / f"log{number}.txt" for number in range(count)]
    processes = []
    try:
        for number, path in enumerate(paths):
            command = [sys.executable, script, str(number), address, str(count), str(folder)]
            with path.open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        failure = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return failure, [path.read_text() for path in paths]


def _wait(processes):
    """Waits until all have ended well, or one has not, or the time is over."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                return f"process {number} ended with code {code}"
        if None not in codes:
            return None
        time.sleep(0.05)
    return f"the processes did not end within {TIMEOUT} seconds"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
