import json
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest

from jdropout._threefry import threefry2x32

DATA = pathlib.Path(__file__).parent / "data"
VECTORS = json.loads((DATA / "threefry2x32.json").read_text())["vectors"]


def words(texts):
    return tuple(jnp.uint32(int(text, 16)) for text in texts)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['rounds']}-{v['key'][0]}")
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_cipher_reproduces_the_published_answers(vector, transform):
    encrypt = transform(lambda k, c: threefry2x32(k, c, rounds=vector["rounds"]))
    output = encrypt(words(vector["key"]), words(vector["counter"]))
    assert [f"{int(word):08x}" for word in output] == vector["output"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['rounds']}-{v['key'][0]}")
def test_the_numpy_twins_cipher_reproduces_the_published_answers(vector):
    key, counter = ([int(text, 16) for text in vector[name]] for name in ("key", "counter"))
    output = law_twin.threefry2x32(key, counter, vector["rounds"])
    assert [f"{int(word):08x}" for word in output] == vector["output"]


def test_cipher_equals_jaxs_own_on_many_counters():
    counters = jax.random.bits(jax.random.key(1), (2, 1000), jnp.uint32)
    key = jax.random.key_data(jax.random.key(2))
    ours = threefry2x32((key[0], key[1]), (counters[0], counters[1]))
    theirs = jax.extend.random.threefry_2x32(key, counters.reshape(-1))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_cipher_is_a_permutation_of_its_counters():
    n = 1 << 14
    counter = (jnp.zeros(n, jnp.uint32), jnp.arange(n, dtype=jnp.uint32))
    y0, y1 = (np.asarray(w, np.uint64) for w in threefry2x32(words(["1", "2"]), counter))
    assert np.unique(y0 << np.uint64(32) | y1).size == n
