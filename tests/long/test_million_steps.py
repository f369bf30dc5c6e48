"""A million steps: one compilation, no memory that grows, and the bits of one compiled loop.

What is called without jax.jit, or makes objects that are thrown away, must not grow either.
"""

import gc
import os
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout import schedules
from jdropout.keys import in_batch, site_key, stratified_key
from jdropout.testing import check_determinism, record, record_training

pytestmark = pytest.mark.long

STEPS = int(os.environ.get("LONG_STEPS", 1_000_000))
ROOT = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((8, 4), np.float32)
RATE = schedules.linear(0.0, 0.5, STEPS)


def resident():
    """The resident memory, in megabytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def compilations():
    """A list that gets an item for each program that XLA compiles or reads from its cache."""
    names = []

    def listen(name, seconds, **more):
        if name.endswith("backend_compile_duration"):
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names  # the listener stays, and does nothing else


# --- a training ---------------------------------------------------------------------------


def start():
    params = {"hidden": np.full((4, 8), 0.1, np.float32), "output": np.ones((8,), np.float32)}
    return jax.device_put((params, np.uint32(0)))


def take_step(step, state):
    """A step of gradient descent. The number mixes the bits of all parameters of all steps."""
    params, number = state
    key = site_key(ROOT, step=step, site="hidden")

    def loss(params):
        x = jnp.tanh(X @ params["hidden"])
        x = jdropout.dropout(key, x, RATE(step))
        return jnp.mean((x @ params["output"] - X[:, 0]) ** 2)

    gradient = jax.grad(loss)(params)
    params = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, gradient)
    for leaf in jax.tree.leaves(params):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        number = number * np.uint32(1664525) + jnp.bitwise_xor.reduce(bits.reshape(-1))
    return params, number


@jax.jit
def take_steps(state, first, last):
    return jax.lax.fori_loop(first, last, take_step, state)


def test_a_million_steps_compile_once_keep_their_memory_and_have_the_bits_of_one_loop(compilations):
    state = start()
    numbers = (np.int32(i) for i in range(STEPS + 1))
    first = next(numbers)
    for last in numbers:
        state = take_steps(state, first, last)
        first = last
        if last == STEPS // 10:
            jax.block_until_ready(state)
            gc.collect()
            compiled, memory, arrays = len(compilations), resident(), len(jax.live_arrays())
    jax.block_until_ready(state)
    gc.collect()
    assert len(compilations) == compiled == 1
    assert len(jax.live_arrays()) == arrays
    assert resident() - memory < 16
    assert np.isfinite(state[0]["hidden"]).all()
    once = take_steps(start(), np.int32(0), np.int32(STEPS))
    jax.tree.map(np.testing.assert_array_equal, state, once)
    # The control: the number tells a single mask of all.
    shifted = take_steps(start(), np.int32(1), np.int32(STEPS))
    assert shifted[1] != once[1]


# --- everything else ----------------------------------------------------------------------

KEY = jax.random.key(1)
WEIGHT = np.ones((4, 3), np.float32)


def fold(i):
    return jax.random.fold_in(KEY, i)


def eager_rates(i):
    jdropout.dropout(fold(i), X, (i % 9973 + 1) / 10_000)


def eager_shapes(i):
    jdropout.dropout(KEY, np.ones((i % 50 + 1, 2), np.float32), 0.5)


def eager_blocks(i):
    jdropout.drop_block(KEY, np.ones((1, 8, 8, 1), np.float32), (i % 997 + 1) / 1000, block_size=2)


def names_of_sites(i):
    site_key(KEY, step=i, site=f"layer{i}")


def parts_of_batches(i):
    jdropout.dropout(in_batch(fold(i), 8, 64), X, 0.5)


def strata(i):
    jdropout.dropout(stratified_key(fold(i), i % 10, 10), X, 0.5)


def outputs(key, weight, x):
    return jdropout.dropout(key, x, 0.5) @ weight


def mc_predict(i):
    jdropout.mc_predict(outputs, fold(i), WEIGHT, X, num_samples=4)


def network():
    return nnx.Sequential(
        nnx.Linear(4, 4, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)),
        jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    )


def modules(i):
    model = network()
    jdropout.nnx.set_site_keys(model, KEY, step=i)
    model(X)


def mc_predict_of_new_modules(i):
    jdropout.nnx.mc_predict(network(), X, fold(i), num_samples=4)


def linen_modules(i):
    model = linen.Sequential([jdropout.linen.Dropout(0.5, deterministic=False)])
    jdropout.linen.with_site_keys(model.apply, KEY, step=i)({}, X)


def replace_dropout(i):
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(i)), nnx.relu)
    assert jdropout.nnx.replace_dropout(model) == 1


def install(i):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in (jdropout.nnx, jdropout.linen):
            package.install()
            package.uninstall()


def recordings(i):
    record(step_of_weight, WEIGHT, X)


def recorded_trainings(i):
    record_training(step_of_weight, WEIGHT, [X, X])


def step_of_weight(weight, x):
    return weight + jdropout.dropout(KEY, x, 0.5).sum() * weight


CALLS = {
    eager_rates: 20_000,
    eager_shapes: 10_000,
    eager_blocks: 10_000,
    names_of_sites: 20_000,
    parts_of_batches: 5000,
    strata: 5000,
    mc_predict: 10_000,
    modules: 10_000,
    linen_modules: 2000,
    replace_dropout: 10_000,
    install: 200,
    mc_predict_of_new_modules: 1000,
    recordings: 16,
    recorded_trainings: 16,
}
"""As many as take about ten seconds on an idle core, or as were asked for."""


@pytest.mark.parametrize(("call", "times"), CALLS.items(), ids=[call.__name__ for call in CALLS])
def test_calls_leave_nothing_behind(call, times, compilations):
    for i in range(times):
        call(i)
        if i == times // 2:
            gc.collect()
            compiled, arrays = len(compilations), len(jax.live_arrays())
            memory, objects = resident(), len(gc.get_objects())
    gc.collect()
    if call not in (recordings, recorded_trainings):  # each compiles a program, and lets it go
        assert len(compilations) == compiled
    assert len(jax.live_arrays()) == arrays
    assert len(gc.get_objects()) - objects < 300
    assert resident() - memory < 16


@pytest.mark.parametrize(
    "call", [jdropout.audit, check_determinism], ids=["audit", "check_determinism"]
)
def test_what_traces_leave_in_the_caches_of_jax_is_cleared_with_them(call):
    """JAX keeps every trace; a check has to trace anew each time."""
    counts = []
    for _ in range(3):
        for _ in range(10):
            call(step_of_weight, WEIGHT, X)
        jax.clear_caches()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 300


def test_the_counts_would_notice_a_leak():
    """The control of the two tests above."""
    kept = []

    def leak(i):
        kept.append([np.ones(1)])

    with pytest.raises(AssertionError, match="300"):
        test_calls_leave_nothing_behind(leak, 2000, [])
    kept.clear()
