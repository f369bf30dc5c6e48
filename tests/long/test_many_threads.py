"""Sixteen threads that call everything at once get the bits that one thread gets."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import RATE, ROWS
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout.keys import in_batch, site_key, stratified_key
from jdropout.testing import check_determinism, mask_fingerprint, record

pytestmark = pytest.mark.long

THREADS = 16
KEY = jax.random.key(20140614)
X = np.random.default_rng(0).standard_normal((8, 6), np.float32)


def eager(row):
    return lambda: row.call(KEY, row.inputs(), row.strength)


def jitted(row):
    function = jax.jit(lambda key, x: row.call(key, x, row.strength))  # shared by all threads
    return lambda: function(KEY, row.inputs())


def step(key, x):
    return jdropout.dropout(key, x, RATE).sum()


def new_model():
    with jdropout.nnx.replacing():
        return nnx.Dropout(0.5, rngs=nnx.Rngs(0))(X)


def site_keys_of_linen():
    model = linen.Dropout(0.5, deterministic=False)
    with jdropout.linen.replacing():
        return jdropout.linen.with_site_keys(model.apply, KEY, step=3)({}, X)


def attention():
    q = jnp.asarray(X).reshape(1, 4, 3, 4)
    return jdropout.dot_product_attention(q, q, q, dropout_key=KEY, dropout_rate=0.5)


def audited():
    """What an audit sees: one call, whatever the other threads call in the meantime."""
    report = jdropout.audit(step, KEY, X)
    assert len(report.sites) == 1
    return str(report)


def recorded():
    recording = record(step, KEY, X)
    return recording.equations, recording._fingerprints


CALLS = {
    **{f"{name}, eager": eager(row) for name, row in ROWS.items()},
    **{f"{name}, jitted": jitted(row) for name, row in ROWS.items()},
    "attention": attention,
    "new model": new_model,
    "linen": site_keys_of_linen,
    "in_batch": lambda: jdropout.dropout(in_batch(KEY, 8, 64), X, 0.5),
    "strata": lambda: jdropout.dropout(stratified_key(KEY, 3, 10), X, 0.5),
    "site_key": lambda: jax.random.key_data(site_key(KEY, step=3, site=("a", 1))),
    "mc_predict": lambda: jdropout.mc_predict(step, KEY, X, num_samples=4).mean,
    "audit": audited,
    "determinism": lambda: str(check_determinism(step, KEY, X)),
    "record": recorded,
    "fingerprint": lambda: mask_fingerprint(KEY, RATE, (16, 32)),
}


def bits(result):
    return [
        leaf if isinstance(leaf, str | int | float) else np.asarray(leaf).tobytes()
        for leaf in jax.tree.leaves(result)
    ]


def test_sixteen_threads_get_the_bits_of_one():
    names = nnx.Dropout, nnx.Linear.__call__, nnx.Dropout.__call__
    expected = {name: bits(call()) for name, call in CALLS.items()}
    jax.clear_caches()  # so that the threads trace and compile too
    start, wrong = threading.Barrier(THREADS), []

    def work(number):
        order = list(CALLS.items())
        first = number * len(order) // THREADS
        start.wait()
        for name, call in order[first:] + order[:first]:
            try:
                if bits(call()) != expected[name]:
                    wrong.append(f"{name}: other bits")
            except BaseException as error:
                wrong.append(f"{name}: {error!r:.300}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:10]
    assert (nnx.Dropout, nnx.Linear.__call__, nnx.Dropout.__call__) == names
