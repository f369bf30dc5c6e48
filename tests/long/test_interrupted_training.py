"""Trainings that are killed, or whose disk is full or cannot be written to, and that resume."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from example_runs import EXAMPLES, environment, run_example

pytestmark = pytest.mark.long

STEPS = 60
SETTINGS = [f"--steps={STEPS}", "--width=8", "--batch-size=16", "--train-size=50"]
KILLS = 6
"""Of each kind. A start takes 3 seconds on an idle core, most of which imports JAX and Orbax."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_example("train_resume.py", *SETTINGS, "--output", tmp_path_factory.mktemp("whole"))


def start(output, largest_file=None):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, EXAMPLES / "train_resume.py", *SETTINGS]
    return subprocess.Popen(
        [*map(str, command), "--save-every=1", "--output", str(output)],
        env=environment(),
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    )


def finish(output, expected):
    """Runs it to its end, which must be that of the training that nothing interrupted."""
    process = start(output)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert out == expected
    return error


def saved_steps(text):
    return [int(step) for step in re.findall(r"^step (\d+) of .* saved$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_at_random_moments_it_ends_in_the_same_bits(name, uninterrupted, tmp_path):
    generator, stop = random.Random(name), signal.Signals[name]
    last = killed = 0
    while killed < KILLS and last < STEPS - 10:
        with start(tmp_path) as process:
            timer = threading.Timer(300, process.kill)
            timer.start()
            reported = process.stderr.readline()  # before it opens the directory
            time.sleep(generator.uniform(0, 2))
            process.send_signal(stop)
            reported += process.stderr.read()
            timer.cancel()
        killed += process.returncode != 0
        # Python ends itself by SIGINT after a KeyboardInterrupt, with its traceback.
        assert process.returncode in (-stop, 0), reported
        assert "damaged" not in reported
        found = re.search(r"^resuming after step (\d+)$", reported, re.MULTILINE)
        if found:  # a checkpoint that was reported is never lost
            assert int(found[1]) >= last, reported
        last = max([last, *saved_steps(reported)])
    assert killed >= 3
    finish(tmp_path, uninterrupted)


@pytest.mark.parametrize("limit", [250, 4000, 6500])
def test_files_that_must_not_grow_end_it_with_a_message(limit, uninterrupted, tmp_path):
    """Errno EFBIG, in the first checkpoint: needs no other rights than any process has."""
    limited = start(tmp_path, largest_file=limit)
    last = check_ended_with_message(limited, "File too large")
    check_resumes_after(last, tmp_path, uninterrupted)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; a function that changes its options."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=10m"):
        pytest.skip("this machine does not let root mount a file system")
    try:
        yield folder, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [40, 100, 188, 264, 300])
def test_a_full_disk_ends_it_with_a_message(kilobytes, disk, uninterrupted):
    """Errno ENOSPC, at another file of a checkpoint for every size."""
    folder, remount = disk
    assert remount(f"size={kilobytes}k")
    process = start(folder / "output")
    last = check_ended_with_message(process, "No space left on device")
    assert remount("size=10m")
    check_resumes_after(last, folder / "output", uninterrupted)


def test_a_disk_that_becomes_read_only_ends_it_with_a_message(disk, uninterrupted):
    folder, remount = disk
    process = start(folder / "output")
    while not process.stderr.readline().startswith("step 5 of"):
        assert process.poll() is None
    deadline = time.monotonic() + 20
    while not remount("ro"):  # between two files: it is refused while one is open
        assert time.monotonic() < deadline
    check_ended_with_message(process, "Read-only file system")

    again = start(folder / "output")
    out, error = again.communicate(timeout=300)
    assert (again.returncode, out) == (1, "")
    assert re.search(r"(cannot be opened|could not be written).*Read-only file system", error)
    assert "Traceback" not in error
    assert remount("rw")
    finish(folder / "output", uninterrupted)


def check_ended_with_message(process, reason):
    """The error status, the last line and no traceback; returns the last checkpoint's step."""
    out, error = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, ""), error
    assert "Traceback" not in error, error
    *_, line = error.splitlines()
    assert re.search(r"cannot be opened|the checkpoint of step \d+ could not be written to ", line)
    assert reason in line
    return max(saved_steps(error), default=0)


def check_resumes_after(last, output, uninterrupted):
    beginning = f"resuming after step {last}" if last else "starting at step 0"
    assert f"{beginning}\n" in finish(output, uninterrupted)
