"""Ctrl-C in the middle of calls: the process is as it was before, and the next call is right.

At random moments of this library's own code (see `interrupts.py`), in every call that traces,
changes a model or changes the process for a while.
"""

import contextvars
import os
import random
import time
import warnings

import interrupts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout import _flax_attention, _record
from jdropout.keys import in_batch, site_key
from jdropout.testing import check_determinism, record, record_training

pytestmark = pytest.mark.long

TRIES = 12
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((4, 6), np.float32)


def linear(rngs):
    return nnx.Linear(6, 6, use_bias=False, kernel_init=nnx.initializers.ones, rngs=rngs)


def eager():
    return jdropout.dropout(site_key(KEY, step=3, site="a"), X, 0.3)


def newly_compiled():
    key = in_batch(KEY, 0, 16)
    return jax.jit(jax.value_and_grad(lambda x: jdropout.dropout(key, x, 0.3).sum()))(X)


def audit():
    return str(jdropout.audit(step, KEY, X))


def determinism():
    return str(check_determinism(step, KEY, X))


def recording():
    model = nnx.Sequential(linear(nnx.Rngs(0)), jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    recording = record(lambda model, x: model(x), model, X)
    return recording.equations, recording._fingerprints


def recorded_training():
    return record_training(lambda w, x: w + step(KEY, x), jnp.ones(3), [X, X])._fingerprints


def step(key, x):
    return jdropout.dropout(key, x, 0.3).sum()


def mc_predict():
    return jdropout.mc_predict(lambda key, x: step(key, x), KEY, X, num_samples=4).mean


def mc_predict_of_a_model():
    model = nnx.Sequential(linear(nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    return jdropout.nnx.mc_predict(model, X, KEY, num_samples=4).mean


def replacing():
    with jdropout.nnx.replacing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nnx.Dropout(0.5, rngs=nnx.Rngs(0))(X)


SHARED = nnx.Sequential(linear(nnx.Rngs(0)), linear(nnx.Rngs(1)))
UNITS = jdropout.nnx.UnitSubset(SHARED, 0.5, incoming=("layers/0",), outgoing=("layers/1",))


def exchanged_kernels():
    return UNITS(X, rngs=KEY)


ATTENTION = jdropout.nnx.MultiHeadAttention(
    2, 6, dropout_rate=0.5, decode=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)
)


def attention():
    ids = jnp.zeros((1, 4), jnp.int32)
    return ATTENTION(X[None], deterministic=False, rngs=KEY, query_segment_ids=ids)


def site_keys_of_nnx():
    jdropout.nnx.set_site_keys(MODEL, KEY, step=3)
    return MODEL(X)


MODEL = nnx.Sequential(*[jdropout.nnx.Dropout(0.2, rngs=nnx.Rngs(i)) for i in range(3)])


def site_keys_of_linen():
    model = linen.Sequential([linen.Dropout(0.5, deterministic=False)])
    with jdropout.linen.replacing():
        return jdropout.linen.with_site_keys(model.apply, KEY, step=3)({}, X)


CALLS = [eager, newly_compiled, audit, determinism, recording, recorded_training, mc_predict]
CALLS += [mc_predict_of_a_model, replacing, exchanged_kernels, attention]
CALLS += [site_keys_of_nnx, site_keys_of_linen]


def process():
    """What calls change for a while."""
    kernels = [layer.kernel for layer in SHARED.layers]
    calls = [vars(kind)["__call__"] for kind in (nnx.Linear, nnx.Dropout, nnx.Sequential)]
    functions = [time.time, time.time_ns, os.listdir, os.scandir, jax.process_index]
    context = contextvars.copy_context()
    variables = [context.get(_record._calls), context.get(_flax_attention._layer_call)]
    names = [nnx.Dropout, nnx.MultiHeadAttention, linen.Dropout]
    return [id(each) for each in (*kernels, *calls, *functions, *variables, *names)]


def bits(result):
    leaves = jax.tree.leaves(result)
    return [leaf if isinstance(leaf, str) else np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])
def test_after_an_interruption_all_is_as_before(call):
    expected = bits(call())
    before = process()
    total = interrupts.count(call)
    generator = random.Random(call.__name__)
    stopped = 0
    for _ in range(TRIES):
        stopped += interrupts.interrupt(call, generator.randrange(total))
        assert process() == before
    # A second call takes less from caches than the first one, and may end before its moment.
    assert stopped >= TRIES // 2
    assert bits(call()) == expected


def test_a_context_manager_that_is_interrupted_inside_is_left():
    before = process()
    for context in (jdropout.nnx.replacing, jdropout.linen.replacing):
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
        assert process() == before
