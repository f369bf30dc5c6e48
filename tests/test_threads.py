"""What one thread does for a while is not seen by the others, and does not outlast it."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdropout.nnx
from jdropout import _key_kinds
from jdropout.testing import _module_scopes
from jdropout.testing._determinism import compare


def in_turns(first, second):
    """Enters two contexts in two threads, and leaves the first one first, unless one waits."""
    left = threading.Event()
    errors = []

    def work():
        try:
            with second():
                left.wait(10)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with first():
        thread.start()
        time.sleep(0.05)
    left.set()
    thread.join()
    assert not errors


@pytest.mark.parametrize("context", [jdropout.nnx.replacing, compare._other_time])
def test_contexts_of_two_threads_leave_the_process_as_it_was(context):
    before = nnx.Dropout, nnx.MultiHeadAttention, time.time, time.time_ns
    in_turns(context, context)
    assert (nnx.Dropout, nnx.MultiHeadAttention, time.time, time.time_ns) == before


def test_names_of_modules_in_two_threads_leave_the_classes_as_they_were(monkeypatch):
    monkeypatch.setattr(_module_scopes, "_subclasses", lambda kind: {nnx.Linear})
    before = nnx.Linear.__call__
    in_turns(_module_scopes.named_modules, _module_scopes.named_modules)
    assert nnx.Linear.__call__ is before


def test_another_thread_sees_the_time_as_it_is():
    seen = []
    with compare._other_time():
        assert time.time() > compare_time() + 5e4
        thread = threading.Thread(target=lambda: seen.append(time.time()))
        thread.start()
        thread.join()
    assert abs(seen[0] - time.time()) < 5e4


def compare_time():
    return time.clock_gettime(time.CLOCK_REALTIME)


def test_threads_that_need_a_new_kind_of_keys_get_the_same(monkeypatch):
    define = jax.extend.random.define_prng_impl

    def slowly(**facts):
        time.sleep(0.05)
        return define(**facts)

    monkeypatch.setattr(jax.extend.random, "define_prng_impl", slowly)
    part = _key_kinds.Part(jax.random.key_impl(jax.random.key(0)), 987_651, None, 0)
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(_key_kinds._implementation(part)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each) for each in made}) == 1


def test_an_audit_in_one_thread_does_not_see_the_calls_of_another():
    key, x = jax.random.key(0), jnp.ones(8)
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        with contextlib.suppress(Exception):
            jdropout.gaussian_dropout(key, x, 0.25)
        done.set()

    def audited(x):
        inside.set()
        assert done.wait(60)
        return jdropout.dropout(key, x, 0.5)

    thread = threading.Thread(target=other)
    thread.start()
    sites = jdropout.audit(audited, x).sites
    thread.join()
    assert [site.kind for site in sites] == ["dropout"]


def test_threads_that_share_a_layer_with_exchanged_kernels_get_its_values():
    exchanged = threading.Event()

    class Block(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(8, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            exchanged.set()
            time.sleep(0.05)
            return self.down(self.up(x))

    block, x, key = Block(), jnp.ones((2, 4)), jax.random.key(0)
    before = block.up.kernel, block.down.kernel
    layer = jdropout.nnx.UnitSubset(
        block, 0.5, incoming=("up",), outgoing=("down",), deterministic=False
    )
    expected = np.asarray(layer(x, rngs=key))
    exchanged.clear()
    results = []
    thread = threading.Thread(target=lambda: results.append(layer(x, rngs=key)))
    thread.start()
    exchanged.wait(10)
    results.append(layer(x, rngs=key))
    thread.join()
    np.testing.assert_array_equal(results, [expected, expected])
    assert block.up.kernel is before[0]
    assert block.down.kernel is before[1]
