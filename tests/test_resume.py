"""Training that is killed and resumed; gradients that are accumulated over microbatches."""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import normal
from example_runs import EXAMPLES, environment, load, run, run_example, run_here
from flax import nnx

import jdropout
from jdropout.keys import site_key

STEPS = 24
SETTINGS = [f"--steps={STEPS}", "--width=8", "--batch-size=16", "--microbatches=4"]
SETTINGS += ["--train-size=50", "--save-every=2"]
TEMPORARY = "*.orbax-checkpoint-tmp"


# --- stopped and resumed, in this process ------------------------------------------------


@pytest.fixture(scope="module")
def example():
    module = load("train_resume")
    with pytest.MonkeyPatch.context() as patch:
        # Its hooks would stay in this process.
        patch.setattr(module._checkpoints, "hide_late_failures", lambda: None)
        yield module


@pytest.fixture(scope="module")
def stopped(example, tmp_path_factory):
    """The output of a training of 8 steps: three checkpoints, of steps 4, 6 and 8."""
    output = tmp_path_factory.mktemp("stopped")
    run_here("train_resume.py", *SETTINGS, "--steps=8", "--output", output)
    return output


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    return run_here("train_resume.py", *SETTINGS, "--output", tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("damaged", "step"), [(False, 8), (True, 6)])
def test_a_training_stopped_and_resumed_ends_in_the_same_bits(
    damaged, step, whole, stopped, tmp_path, capsys
):
    output = copy(stopped, tmp_path / "copy")
    if damaged:
        (checkpoints(output) / "8" / "metadata" / "metadata").write_text("{")
    assert run_here("train_resume.py", *SETTINGS, "--output", output) == whole
    error = capsys.readouterr().err
    assert ("8 is damaged (JSONDecodeError: " in error) == damaged
    assert f"resuming after step {step}\n" in error


# --- killed and resumed -------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"))


def run_whole(output, **settings):
    return run_example("train_resume.py", *SETTINGS, "--output", output, **settings)


@pytest.mark.long
def test_a_process_that_compiles_for_itself_ends_in_the_same_bits(uninterrupted, tmp_path):
    assert run_whole(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == uninterrupted


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    output = tmp_path_factory.mktemp("killed")
    step = random.Random(0).randrange(2, STEPS - 4, 2)
    with started(output) as process:
        wait_for(process, f"step {step} of {STEPS}")
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert step <= newest_step(output) < STEPS
    return output


@contextlib.contextmanager
def started(output, *options):
    """Starts the example; ends it with SIGKILL, at the latest after two minutes."""
    command = [sys.executable, EXAMPLES / "train_resume.py", *SETTINGS, "--output", output]
    process = subprocess.Popen(
        [*map(str, command), *options],
        env=environment(),
        encoding="utf-8",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for(process, beginning):
    """Reads what the process reports, up to a line with this beginning."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"ended, or took too long, before it reported {beginning!r}:\n{''.join(lines)}")


def newest_step(output):
    return max(int(path.name) for path in checkpoints(output).iterdir() if path.name.isdigit())


def checkpoints(output):
    return pathlib.Path(output) / "checkpoints"


def copy(output, to):
    return pathlib.Path(shutil.copytree(output, to))


def resume(output, *options, **settings):
    result = run(EXAMPLES / "train_resume.py", *SETTINGS, *options, "--output", output, **settings)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.long
def test_a_training_killed_several_times_ends_in_the_same_bits(
    uninterrupted, killed_once, tmp_path
):
    """The second time while it writes a checkpoint; and checkpoints are now at other steps."""
    output = copy(killed_once, tmp_path / "copy")
    with started(output, "--save-every=1") as process:
        wait_for(process, "step ")
        unfinished = stop_while_it_writes(process, checkpoints(output))
    assert process.returncode == -signal.SIGKILL
    (path,) = checkpoints(output).glob(TEMPORARY)
    assert path.name == unfinished

    result = resume(output, "--save-every=3")
    assert f"{path} is half-written: it is not used\n" in result.stderr
    assert f"resuming after step {int(path.name.split('.')[0]) - 1}\n" in result.stderr
    assert not list(checkpoints(output).glob(TEMPORARY))
    assert result.stdout == uninterrupted


def stop_while_it_writes(process, directory):
    """Stops the process at a moment at which a checkpoint is not complete; returns its name."""
    while process.poll() is None:
        if list(directory.glob(TEMPORARY)):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            for path in directory.glob(TEMPORARY):
                return path.name
            process.send_signal(signal.SIGCONT)
    pytest.fail("it ended, or took too long, before a checkpoint was seen half-written")


def test_with_other_microbatches_the_masks_are_the_same_and_the_losses_to_rounding(
    whole, stopped, tmp_path
):
    output = copy(stopped, tmp_path / "copy")
    result = run_here("train_resume.py", *SETTINGS, "--microbatches=1", "--output", output)
    assert masks(result) == masks(whole)
    np.testing.assert_allclose(losses(result), losses(whole), rtol=1e-5)


@pytest.mark.examples
def test_on_more_devices_the_masks_are_the_same_and_the_losses_to_rounding(
    uninterrupted, killed_once, tmp_path
):
    output = copy(killed_once, tmp_path / "copy")
    result = resume(output, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert "training on 4 of 4 device(s)\n" in result.stderr
    assert f"resuming after step {newest_step(killed_once)}\n" in result.stderr
    assert masks(result.stdout) == masks(uninterrupted)
    np.testing.assert_allclose(losses(result.stdout), losses(uninterrupted), rtol=1e-5)


def masks(text):
    return re.search(r"^masks of the last step: ([0-9a-f]{16})$", text, re.MULTILINE)[1]


def losses(text):
    return [float(loss) for loss in re.findall(r"^\w+ loss (\d\.\d{6}),", text, re.MULTILINE)]


# --- damage -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_after_damage(tmp_path_factory):
    """What is read after each damage to the newer one of two checkpoints."""
    script = pathlib.Path(__file__).parent / "damage_checkpoints.py"
    result = run(script, tmp_path_factory.mktemp("damage"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {one["damage"]: one for one in found}


def test_no_damage_to_any_file_changes_what_is_read_without_notice(read_after_damage):
    assert len(read_after_damage) > 30
    for one in read_after_damage.values():
        assert one["same"], one
        # Files that are not needed may be damaged: all arrays have been checked nevertheless.
        if one["read"] == 2:
            assert (one["left"], one["report"]) == ([1, 2], ""), one
        else:
            assert (one["read"], one["left"]) == (1, [1]), one
            assert "2 is damaged (" in one["report"], one
            assert one["report"].endswith("): it is not used\n"), one


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncate 2/metadata/metadata", "JSONDecodeError"),
        ("delete 2/metadata/metadata", "FileNotFoundError"),
        ("flip 2/state/_METADATA", ""),
        ("truncate 2/state/manifest.ocdbt", "DATA_LOSS"),
        ("flip 2/state/manifest.ocdbt", ""),
        ("empty directory", 'Item "metadata" was not found'),
        ("no metadata", 'Item "metadata" was not found'),
        ("arrays of another step", "the arrays are not those that were saved"),
        ("checkpoint of another step", "it is the checkpoint of step 1"),
        ("settings edited", "the settings are not those that were saved"),
    ],
)
def test_damage_is_named_and_the_last_good_checkpoint_is_used(damage, reason, read_after_damage):
    one = read_after_damage[damage]
    assert (one["read"], one["left"]) == (1, [1])
    assert reason in one["report"]


def test_altered_arrays_that_orbax_reads_without_an_error_are_noticed(read_after_damage):
    """Its checksums do not cover the files of large arrays: ours are needed."""
    flipped = [one for name, one in read_after_damage.items() if name.startswith("flip 2/state")]
    assert any("the arrays are not those that were saved" in one["report"] for one in flipped)


def test_without_damage_the_newest_checkpoint_is_used(read_after_damage):
    one = read_after_damage["nothing"]
    assert (one["read"], one["left"], one["report"]) == (2, [1, 2], "")


def test_a_checkpoint_that_cannot_be_written_is_named_with_the_reason(example):
    class OnFullDisk:
        directory = "/full"

        def save(self, step, args):
            raise ValueError(f"Error writing /full/{'long/' * 200}: No space left on device")

    with pytest.raises(SystemExit) as ended:
        example._checkpoints.save(OnFullDisk(), 7, {"a": np.ones(1)}, {})
    assert re.fullmatch(
        r"the checkpoint of step 7 could not be written to /full \(ValueError: Error writing .* "
        r"No space left on device\)\. .*: it resumes from the last checkpoint",
        ended.value.code,
    )


@pytest.fixture(scope="module")
def beginning(example, tmp_path_factory):
    """Options, training, data and state of the example, as it is before its first step."""
    options = parse(example, *SETTINGS, f"--output={tmp_path_factory.mktemp('unused')}")
    training = example.make_training(options)
    return options, training, *example.make_data_and_start(options, training)


def parse(example, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_resume.py", *words])
        return example.parse_options()


@pytest.fixture
def resume_here(example, beginning):
    """What the example does on its start, in this process; returns the step."""

    def call(output, **changed):
        options, training, _, start = beginning
        options = argparse.Namespace(**(vars(options) | changed))
        with example._checkpoints.open_directory(checkpoints(output)) as manager:
            return int(example.resume(options, training, manager, start).step)

    return call


def test_without_a_good_checkpoint_nothing_is_trained_or_removed(
    stopped, resume_here, tmp_path, capsys
):
    output = copy(stopped, tmp_path / "copy")
    for path in checkpoints(output).glob("*/metadata/metadata"):
        path.write_text("{")
    before = contents(output)
    with pytest.raises(SystemExit) as ended:
        resume_here(output)
    assert re.fullmatch(
        r"no checkpoint in .*/checkpoints is good\. Remove the directory to train from the start, "
        r"or pass another --output",
        ended.value.code,  # a text: it is printed, and the exit status is 1
    )
    assert capsys.readouterr().err.count("is damaged (JSONDecodeError: ") == 3
    assert contents(output) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("seed", 1, "pass 0, with which the checkpoints in "),
        ("rate", 0.25, "pass 0.5, with which the checkpoints in "),
        ("width", 16, "pass 8, with which the checkpoints in "),
        ("steps", 1, "pass at least "),
    ],
)
def test_options_that_do_not_fit_the_checkpoints_are_named(
    option, value, fix, stopped, resume_here
):
    assert resume_here(stopped) == 8
    before = contents(stopped)
    with pytest.raises(SystemExit) as ended:
        resume_here(stopped, **{option: value})
    assert ended.value.code.startswith(f"argument --{option}: got {value}, {fix}")
    assert contents(stopped) == before


def test_an_option_that_does_not_fit_another_is_named(example, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(example, "--batch-size=16", "--microbatches=3", f"--output={tmp_path}")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "argument --microbatches: got 3, pass a divisor of --batch-size 16" in error


# --- accumulated gradients ----------------------------------------------------------------

STEP = 5
COUNT = 4
SIZE = 4


@pytest.fixture(scope="module")
def accumulation(example, beginning):
    """The example's options, training and parameters, and a batch of four microbatches."""
    options, training, data, start = beginning
    batch = jax.tree.map(lambda x: example.split_batch(training, x[: COUNT * SIZE]), data.train)
    return options, training, start.params, batch


@pytest.fixture(scope="module")
def accumulated(example, accumulation):
    _, *arguments = accumulation
    return accumulate(example, *arguments)


def accumulate(example, training, params, batch):
    return jax.jit(functools.partial(example.accumulate, training))(params, STEP, batch)


def test_the_masks_of_all_microbatches_and_layers_differ(example, accumulation):
    options, training, *_ = accumulation
    assert len(different_masks(example, options, training)) == 2 * COUNT


def different_masks(example, options, training):
    masks = np.asarray(jax.jit(functools.partial(example.make_masks, options, training))(STEP))
    assert masks.shape == (2, COUNT * SIZE, options.width)
    return {mask.tobytes() for mask in masks.reshape(2 * COUNT, -1)}


def test_accumulation_equals_its_definition_to_rounding(example, accumulation, accumulated):
    _, training, params, batch = accumulation
    one = jax.jit(functools.partial(example.loss_and_gradient, training))
    total = jax.tree.map(np.zeros_like, (np.float32(0), params))
    for microbatch in range(COUNT):
        samples = jax.tree.map(lambda x, m=microbatch: x[m], batch)
        total = jax.tree.map(np.add, total, one(params, STEP, microbatch * SIZE, samples))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, accumulated, jax.tree.map(lambda x: x / COUNT, total))


def test_accumulation_equals_its_definition_exactly_where_nothing_is_rounded(
    example, accumulation, monkeypatch
):
    """With small integers all sums are exact: no compiler and no order can make a difference."""
    _, training, params, batch = accumulation
    monkeypatch.setattr(example.train_mlp, "cross_entropy", linear_loss)
    params = jax.tree.map(lambda x: np.sign(x) + 1, params)
    batch = batch._replace(images=jnp.round(batch.images))
    loss, gradient = accumulate(example, training, params, batch)

    expected_loss, expected = 0, jax.tree.map(np.zeros_like, params)
    one = jax.jit(jax.value_and_grad(definition))
    for microbatch in range(COUNT):
        samples = jax.tree.map(lambda x, m=microbatch: np.asarray(x[m]), batch)
        term = one(params, microbatch, samples)
        expected_loss += term[0]
        expected = jax.tree.map(np.add, expected, term[1])
    assert loss == expected_loss / COUNT
    jax.tree.map(
        lambda ours, total: np.testing.assert_array_equal(ours, total / COUNT), gradient, expected
    )
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))

    uncut = jax.tree.map(lambda x: x.reshape(1, COUNT * SIZE, *x.shape[2:]), batch)
    of_whole = accumulate(example, training._replace(microbatches=1), params, uncut)
    jax.tree.map(np.testing.assert_array_equal, (loss, gradient), of_whole)


def linear_loss(logits, labels):
    return logits[jnp.arange(len(labels)), labels].mean()


def definition(params, microbatch, samples):
    """The loss of one microbatch, as the documentation defines it, at rate 0.5: a scale of 2."""
    x = samples.images
    for site in ("hidden1", "hidden2"):
        key = site_key(jax.random.key(0), step=STEP, site=site)
        mask = jdropout.keep_mask(key, 0.5, (COUNT * SIZE, 8)).reshape(COUNT, SIZE, 8)[microbatch]
        x = jnp.where(mask, 2 * jax.nn.relu(affine(params[site], x)), 0)
    return linear_loss(affine(params["output"], x), samples.labels)


def affine(layer, x):
    return x @ layer["kernel"][...] + layer["bias"][...][None]


def test_one_key_for_all_microbatches_would_be_noticed(
    example, accumulation, accumulated, monkeypatch
):
    """The control of the tests above: the mistake that they are to find."""
    monkeypatch.setattr(example, "in_batch", lambda key, first, size: key)
    wrong = accumulate(example, *accumulation[1:])
    difference = jax.tree.map(lambda a, b: float(abs(a - b).max()), wrong, accumulated)
    assert min(jax.tree.leaves(difference)) > 1e-3


# --- documentation ------------------------------------------------------------------------


def test_the_code_of_the_page_runs_and_does_what_it_says(tmp_path):
    text = (EXAMPLES.parent / "docs" / "resume.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    page = {"directory": tmp_path}
    for block in blocks:
        exec(block, page)
    page["manager"].close()
    params = page["params"]

    images, labels = normal(40, 64), np.arange(40) % 10
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        state = page["train_step"](page["state"], images, labels)
    assert state["step"] == 1
    model = page["saved"], page["random_state"]
    outputs = [page["outputs"](*model, images, step) for step in (7, 8, 7)]
    assert (outputs[0] == outputs[2]).all()
    assert (outputs[0] != outputs[1]).any()
    assert {"kernel", "bias"} == {path[-1] for path, _ in nnx.to_flat_state(page["saved"])}
    batches = images.reshape(4, 10, 64), labels.reshape(4, 10)
    total = jax.jit(page["accumulated_gradient"])(params, batches, 7)
    gradient = jax.jit(jax.grad(page["loss"]))(params, images, labels, 7)
    for name, leaf in total.items():
        np.testing.assert_allclose(leaf, gradient[name], rtol=1e-5, atol=1e-7)
