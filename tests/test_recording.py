"""A recording has every value's fingerprint, and the first difference is where the fault is."""

import gzip
import json
import linecache
import pathlib
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from planted import NONE, Planted, located

from jdropout.testing import (
    Recording,
    _fingerprint,
    assert_reproducible,
    first_difference,
    record,
    record_training,
)

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3), np.float32))


# --- fingerprints -------------------------------------------------------------------------

DTYPES = ["bool", "int4", "uint8", "int16", "uint32", "float8_e4m3fn", "bfloat16", "float16"]
DTYPES += ["float32", "complex64"]


def unmixed(x):
    """The inverse of the mix of 32 bits."""
    x = np.asarray(x, np.uint64)
    last = np.uint64(2**32 - 1)

    def undo_shift(x, shift):
        y = x
        for _ in range(32 // shift + 1):
            y = x ^ (y >> np.uint64(shift))
        return y

    for shift, factor in ((16, 0x846CA68B), (15, 0x7FEB352D)):
        x = undo_shift(x, shift) * np.uint64(pow(factor, -1, 2**32)) & last
    return undo_shift(x, 16)


def test_the_mix_has_an_inverse_so_that_no_changed_element_keeps_its_term():
    words = np.random.default_rng(0).integers(0, 2**32, 10000, np.uint32)
    assert (unmixed(_fingerprint.mix(words)) == words).all()


def arrays(values):
    return [jnp.asarray(values).astype(dtype) for dtype in DTYPES]


def test_fingerprints_change_with_every_bit_index_and_dtype():
    """All in one program: values, the same with one element changed, and with two swapped."""
    base = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
    changed, swapped = base.copy(), base[:, [1, 0, 2, 3, 4]]
    changed[1, 2] = 1
    more = np.float32([[0.0, 1.0], [-0.0, 1.0], [np.nan, 1.0]])
    nan = (more[2:].view(np.uint32) ^ np.uint32(1)).view(np.float32)
    keys = [jax.random.key(0, impl=impl) for impl in ("threefry2x32", "rbg")]
    others = [jnp.asarray(row) for row in (*more, nan[0])]
    others += [jnp.complex64([1, 3 + 2j]), jnp.complex64([1, 3 + 4j]), jnp.zeros((0, 3)), *keys]
    bits = jnp.asarray(np.uint32(1) << np.arange(32, dtype=np.uint32))
    groups = [arrays(base), arrays(changed), arrays(swapped), others, list(bits), [base.T.copy()]]
    flat = [x for group in groups for x in group]
    rows = np.asarray(jax.jit(_fingerprint.fingerprints)(flat))
    of = iter(map(tuple, rows))
    base_rows, changed_rows, swapped_rows, other_rows, bit_rows, _ = (
        [next(of) for _ in group] for group in groups
    )
    for i, dtype in enumerate(DTYPES):
        assert len({base_rows[i], changed_rows[i], swapped_rows[i]}) == 3, dtype
    assert len(set(other_rows)) == len(other_rows)
    assert len(set(bit_rows)) == 32
    assert not (rows[:, 0] == rows[:, 1])[: len(DTYPES)].any()


def test_fingerprints_are_the_known_ones():
    """They are in files, so they must not change."""
    got = jax.jit(_fingerprint.fingerprint)(jnp.arange(6, dtype=jnp.uint32).reshape(2, 3))
    index = np.arange(6, dtype=np.uint64) * 0x9E3779B1 + 0x9E3779B9
    first = _fingerprint.mix(np.arange(6, dtype=np.uint32) ^ index.astype(np.uint32))
    second = (first ^ (first >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    second ^= second >> np.uint32(16)
    assert list(got) == [first.sum(dtype=np.uint32), second.sum(dtype=np.uint32)]
    assert list(map(int, got)) == KNOWN


KNOWN = [2073637712, 2461701055]


# --- faults -------------------------------------------------------------------------------


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def everything(w, xs, key):
    """A step with every kind of equation that is entered."""

    def cell(carry, x):
        inner = lax.fori_loop(0, 2, lambda i, c: c * 0.5 + x, carry)
        return lax.cond(x[0, 0] > 0, jnp.tanh, jax.checkpoint(sine), inner @ w), x.sum()

    def loss(w):
        last, sums = lax.scan(cell, xs[0] @ w, xs, reverse=True)
        return (last**2).sum() + sums.sum()

    def halve(x):
        return x * 0.5 + jax.random.uniform(key, x.shape)

    value, gradient = jax.value_and_grad(loss)(w)
    halve_each = jax.vmap(lambda x: lax.while_loop(lambda x: jnp.abs(x).max() > 2, halve, x))
    halved = halve_each(8 * w)  # rows end in different iterations
    return value, jax.jit(jnp.cos)(gradient), halved


@pytest.fixture(scope="module")
def planted():
    planted = Planted(everything, X[0], X, jax.random.key(0), max_iterations=4)
    planted.prepare(planted.spots)
    return planted


def test_planted_faults_are_located_exactly(planted):
    generator = random.Random(1)
    kinds, rows = {}, list(planted.spots)
    for row in generator.sample(rows, 40):
        fault, kind = planted.choose(generator, row)
        difference = first_difference(planted.clean, planted.record(fault))
        assert located(planted, row, difference), (planted.spots[row], str(difference))
        kinds[kind] = kinds.get(kind, 0) + 1
    assert {kind.partition(" in ")[2] for kind in kinds} >= {
        "a gradient",
        "an iteration or branch",
        "an operation",
    }


def test_a_recording_computes_what_the_function_does(planted):
    traced = planted.traced
    outputs, _, _ = planted.run(NONE, True, traced.closed.consts, traced.leaves)
    wanted = everything(X[0], X, jax.random.key(0))
    for one, other in zip(traced.rebuild(outputs)[0], wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_every_row_is_found_once(planted):
    """The layout of a recording: no two rows have one place, and values have the right shape."""
    rows = planted.clean._fingerprints
    places = {planted.program.find(row, rows)[:4] for row in range(len(rows)) if rows[row]}
    assert len(places) == np.count_nonzero(rows)
    kinds = {equation.kind for equation in planted.program.block.walk()}
    assert kinds == {"plain", "scan", "while", "cond"}


# --- words --------------------------------------------------------------------------------


def test_the_first_difference_says_what_is_known():
    def step(w, xs, noise):
        def cell(c, x):
            c = jnp.tanh(c @ w)
            return c + x, None  # the line

        return lax.scan(cell, xs[0], xs + noise)[0] * 2

    noise = jnp.zeros_like(X)
    a = record(step, X[0], X, noise, values=True)
    b = record(step, X[0], X, noise.at[2, 1, 0].set(1e-3), values=True)
    argument = first_difference(a, b)
    assert (argument.kind, argument.name) == ("argument", "argument noise")
    assert argument.elements == (1, 36)
    assert "1 of 36, first at (2, 1, 0): 0.0 and 0.0010000000474974513 (0.001 apart," in str(
        argument
    )
    # Without the arguments, the first equation that differs is the sum.
    b._fingerprints[:3] = a._fingerprints[:3]
    assert first_difference(a, b).primitive == "add"
    before = next(e.number for e in a._program.block.walk() if e.kind == "scan")
    row = 3 + next(i for i in range(9) if a._program.find(3 + i, ()).equation.number > before)
    b._fingerprints[3:row] = a._fingerprints[3:row]
    inner = first_difference(a, b)
    assert inner.primitive == "add"
    assert (inner.dtype, inner.shape, inner.iterations) == ("float32", (3, 3), (2,))
    assert inner.function.endswith("cell")
    assert inner.elements == (1, 9)
    text = str(inner)
    for part in (
        r"line +test_recording\.py:\d+ in .*cell: return c \+ x, None  # the line",
        r"in +iteration 2 of 4 of the scan at test_recording\.py",
        r"operand +equation \d+ \(tanh\) at test_recording\.py:\d+: equal",
        r"operand +a slice of equation \d+ \(add\) at test_recording\.py:\d+: equal",
        r"elements +1 of 9, first at \(1, 0\)",
    ):
        assert re.search(part, text), text


def helper(x):
    return jnp.where(x > 0, x, 0.0)


def test_the_line_is_of_this_call_though_jax_traced_another_one():
    def twice(x):
        x = helper(x) + 1
        return jnp.where(x > 0, x, 0.0)  # the second call

    selects = [
        equation.source
        for equation in record(twice, X)._program.block.walk()
        if equation.primitive == "select_n"
    ]
    assert [source.function.rpartition(".")[2] for source in selects] == ["helper", "twice"]
    assert selects[1].text.endswith("# the second call")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.int32(0))

    def __call__(self, x):
        self.seen[...] += 1
        return self.dense(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = jax.nn.relu(block(x))
        return x


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(3)(x)
        return linen.Dense(3)(x)


def paths(recording, primitive):
    equations = recording._program.block.walk()
    return [equation.source.path for equation in equations if equation.primitive == primitive]


def test_modules_are_named_and_their_state_is_a_result():
    model = Model(nnx.Rngs(0))
    apply = jax.jit(lambda state, x: nnx.merge(structure, state)(x))
    structure, state = nnx.split(model)
    apply(state, X)  # JAX has it in its cache, without names
    call = Block.__call__
    assert paths(record(apply, state, X), "dot_general") == [
        f"Model/blocks/{i}/dense" for i in (0, 1)
    ]
    recording = record(nnx.jit(lambda model, x: model(x)), model, X)
    assert paths(recording, "dot_general") == [f"Model/blocks/{i}/dense" for i in (0, 1)]
    assert Block.__call__ is call
    assert int(model.blocks[0].seen[...]) == 0  # a recording leaves them alone
    names = [name for name, _ in recording._program.arguments]
    assert "model.blocks.1.dense.kernel" in names

    variables = Linen().init(jax.random.key(0), X)
    gradient = jax.value_and_grad(lambda variables, x: Linen().apply(variables, x).sum())
    dots = paths(record(gradient, variables, X), "dot_general")
    assert dots[:2] == ["Linen/Dense_0", "Linen/Dense_1"]
    assert set(dots[2:]) == {"Linen/Dense_0", "Linen/Dense_1"}  # the backward pass


# --- different programs -------------------------------------------------------------------


def test_programs_are_compared_as_far_as_they_agree():
    def program(last, length=3, first=2.0):
        def run(x):
            x = x * first
            x = lax.scan(lambda c, _: (c + 1, None), x, length=length)[0]
            return last(x)

        return record(run, X[0])

    double = program(lambda x: x * 2)
    assert first_difference(double, program(lambda x: x * 2)) is None
    for other, name, words in (
        (program(lambda x: x * 3), "equation 3 (mul)", "the number 3.0"),
        (program(lambda x: jnp.sin(x * 2)), "equation 4 (sin)", "in a  the end"),
        (program(jnp.sin), "equation 3 (mul)", "3, sin"),
        (program(lambda x: x * 2, length=4), "equation 1 (scan)", "of length 4"),
    ):
        difference = first_difference(double, other)
        assert (difference.kind, difference.name) == ("program", name)
        assert words in str(difference)
        assert "before this all values are equal" in str(difference)
    # What differs before is told first, though the programs are different, too.
    assert first_difference(double, program(jnp.sin, first=3.0)).name == "equation 0 (mul)"
    other = record(lambda x, y: x, X[0], X[0])
    assert "y: float32[3,3]" in str(first_difference(double, other))


def test_a_difference_after_the_last_kept_iteration_is_found():
    def count(start, late):
        def add(carry):
            i, x = carry
            return i + 1, x + jnp.where(i == 6, late, 0.0)

        return lax.while_loop(lambda carry: carry[0] < start + 9, add, (start, late * 0))

    zero, run = jnp.int32(0), lambda *args, **more: record(count, *args, **more)
    a, b = (run(zero, jnp.float32(x), max_iterations=4) for x in (1, 2))
    for recording in (a, b):
        recording._fingerprints[:2] = 0  # only the loop
    difference = first_difference(a, b)
    assert difference.iterations == (4,)
    assert "iteration 4 or later (see max_iterations)" in str(difference)
    longer = run(zero, jnp.float32(2), max_iterations=12)
    longer._fingerprints[:2] = 0
    assert first_difference(b, longer) is None  # compared in the iterations that both kept
    assert first_difference(longer, longer) is None


# --- files --------------------------------------------------------------------------------


def test_files_hold_everything_but_the_values(planted, tmp_path):
    path = tmp_path / "step.rec"
    planted.clean.save(path)
    loaded = Recording.load(path)
    assert loaded == planted.clean
    assert first_difference(planted.clean, loaded) is None
    assert repr(loaded) == repr(planted.clean)
    assert repr(loaded).startswith(f"Recording({planted.program.equations} equations, JAX ")
    assert path.stat().st_size < 12_000
    contents = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps(contents | {"version": 99}).encode()))
    with pytest.raises(ValueError, match="version 99, and this jdropout reads version 1"):
        Recording.load(path)
    for wrong in (b"no gzip", gzip.compress(b"[]"), gzip.compress(b"{"), path.read_bytes()[:50]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"path must be a file that Recording.save wrote"):
            Recording.load(path)


def test_a_file_that_was_cut_or_altered_anywhere_is_noticed_or_reads_the_same(tmp_path):
    """As what is left of a process that was killed, or of a full disk."""
    recording, path = record(jnp.sin, X), tmp_path / "step.rec"
    recording.save(path)
    data = path.read_bytes()
    damaged = [data[:length] for length in range(len(data))]
    noticed = len(damaged)
    damaged += [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(len(data))]
    reasons = set()
    for number, wrong in enumerate(damaged):
        path.write_bytes(wrong)
        try:
            assert Recording.load(path) == recording
            assert number >= noticed
        except ValueError as error:
            reasons.add(str(error).partition(", got ")[0])
    assert reasons == {"path must be a file that Recording.save wrote"}


def test_a_save_that_fails_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "recording"
    recording = record(jnp.sin, X)
    recording.save(path)

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(gzip, "compress", fail)
    with pytest.raises(OSError, match="No space"):
        record(jnp.cos, X).save(path)
    assert Recording.load(path) == recording
    assert list(tmp_path.iterdir()) == [path]


# --- trainings ----------------------------------------------------------------------------


def batches(fault_at=None, n=6):
    return [(i, jnp.float32(1 + (i == fault_at))) for i in range(n)]


def test_a_training_names_its_first_step():
    @jax.jit
    def step(state, batch):
        number, x = batch
        w = state["w"] * 0.5 + jnp.sin(x) * number
        return {"w": w}, w.sum()

    def run(every, fault_at=None, n=6):
        return record_training(step, {"w": X[0]}, batches(fault_at, n), every=every)

    good, bad = run(1), run(1, fault_at=4)
    assert good.steps == tuple(range(6))
    assert first_difference(good, run(1)) is None
    difference = first_difference(good, bad)
    assert (difference.step, difference.name) == (4, "argument batch.1")
    coarse = run(3, fault_at=4)
    assert coarse.steps == (0, 3)
    for one in (good, run(3)):  # one recorded all steps, the other every third
        difference = first_difference(one, coarse)
        assert (difference.kind, difference.step, difference.name) == ("state", 5, "state.w")
        assert "step 4 made it, which was not recorded: record again with every=4" in str(
            difference
        )
    assert "6 and 4 steps" in str(first_difference(good, run(1, n=4)))
    bad._fingerprints[4] = good._fingerprints[4]
    assert "no equation of step 4 differs in its recording" in str(first_difference(good, bad))
    with pytest.raises(ValueError, match="b is a recording of a training and the other one is not"):
        first_difference(record(jnp.sin, X), good)


def test_a_training_may_change_modules_in_place():
    def step(model, x):
        model.blocks[0].dense.kernel[...] += x
        model(X)

    model = Model(nnx.Rngs(0))
    a = record_training(step, model, [1.0, 2.0])
    assert int(model.blocks[0].seen[...]) == 2
    b = record_training(step, Model(nnx.Rngs(0)), [1.0, 3.0], every=2)
    difference = first_difference(a, b)
    assert (difference.kind, difference.step) == ("state", 2)
    assert difference.name == "state.blocks.0.dense.kernel"


def test_trainings_that_cannot_be_recorded_are_errors():
    def record_steps(step, batches):
        return record_training(step, jnp.float32(0), batches)

    with pytest.raises(ValueError, match="batches must not be empty"):
        record_steps(lambda state, x: state, [])
    with pytest.raises(ValueError, match="batches must all have the types of the first one"):
        record_steps(lambda state, x: state + x.sum(), [jnp.ones(2), jnp.ones(3)])
    with pytest.raises(ValueError, match="step must return the next state"):
        record_steps(lambda state, x: {"w": state}, [1.0])
    with pytest.raises(ValueError, match="state must hold an array"):
        record_training(lambda state, x: state, {}, [1.0])


# --- documentation ------------------------------------------------------------------------


def test_the_documented_difference_is_what_its_code_prints(monkeypatch, capsys):
    page = pathlib.Path(__file__).parent.parent / "docs" / "testing.md"
    block = r"```python\n(import jax\nimport jax.numpy.*?)```\n\n```\n(.*?)```"
    code, printed = re.search(block, page.read_text(), re.DOTALL).groups()
    lines = code.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, "train.py", (len(code), None, lines, "train.py"))
    exec(compile(code, "train.py", "exec"), {})

    def without_noise(text):
        return re.sub(r"(first at \(0, 0\)).*", r"\1", text)

    assert without_noise(capsys.readouterr().out) == without_noise(printed)


# --- assertions ---------------------------------------------------------------------------


def test_assert_reproducible_names_the_line():
    generator = np.random.default_rng(0)

    def train():
        return X[0] * 2 + jnp.asarray(generator.standard_normal(3, np.float32))[None]

    with pytest.raises(AssertionError, match=r"in run 2, result differs(.|\n)*constant \d differs"):
        assert_reproducible(train)
    counter = iter(range(9))
    with pytest.raises(AssertionError, match=r"cannot be traced as a whole \(Concretization"):
        assert_reproducible(lambda: float(jnp.float32(1)) + next(counter))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: record(3), TypeError, "fn must be a function"),
        (lambda: record(jnp.sin, X, values=1), TypeError, "values must be True or False"),
        (lambda: record(jnp.sin, X, max_iterations=0), ValueError, "max_iterations must be at"),
        (lambda: record_training(jnp.sin, X, [], every=0), ValueError, "every must be at least 1"),
        (lambda: first_difference(X, X), TypeError, "a must be a Recording, got"),
    ],
)
def test_wrong_arguments_are_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
