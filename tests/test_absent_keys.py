"""Attention: what no query attends to has no effect, whatever is there; extreme positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import normal

import jdropout

KEY = jax.random.key(0)
B, T, S, N, H = 2, 10, 12, 2, 4
QUERY, KEYS, VALUES = (normal(B, n, N, H, seed=seed) for seed, n in enumerate((T, S, S)))


@jax.jit
def passes(query, keys, values, lengths, query_lengths, mask):
    """Outputs and gradients of three calls that leave out the last queries or keys, or one key."""

    def call(query, keys, values):
        def attention(**where):
            return jdropout.dot_product_attention(
                query, keys, values, dropout_key=KEY, dropout_rate=0.3, block_sizes=(4, 4), **where
            )

        return (
            attention(key_value_seq_lengths=lengths),
            attention(query_seq_lengths=query_lengths, key_value_seq_lengths=lengths),
            attention(mask=mask),
        )

    outputs, pullback = jax.vjp(call, query, keys, values)
    return outputs, pullback(jax.tree.map(jnp.cos, outputs))


def test_nan_and_infinity_behind_the_lengths_or_under_the_mask_have_no_effect():
    lengths, query_lengths = jnp.array([8, 8]), jnp.array([9, 9])
    mask = jnp.ones((1, 1, T, S), bool).at[..., 8:].set(False)
    expected = passes(QUERY, KEYS, VALUES, lengths, query_lengths, mask)
    for bad in (jnp.nan, jnp.inf):
        keys, values = (x.at[:, 8:].set(bad) for x in (KEYS, VALUES))
        results = passes(QUERY, keys, values, lengths, query_lengths, mask)
        jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_a_value_of_nan_reaches_the_queries_that_attend_to_it_and_no_others():
    @jax.jit
    def attend(values, rate):
        return jdropout.dot_product_attention(
            QUERY, KEYS, values, dropout_key=KEY, dropout_rate=rate, is_causal=True,
            block_sizes=(4, 4), dropout_precision=32,
        )  # fmt: skip

    values = VALUES.at[:, 7, :, 1].set(jnp.nan)
    finite = np.isfinite(attend(values, 0.0)).all((0, 2))
    np.testing.assert_array_equal(finite[:, 1], np.arange(T) < 7)
    assert finite[:, [0, 2, 3]].all()

    values = VALUES.at[:, 7].set(jnp.inf)
    kept = np.moveaxis(jdropout.keep_mask(KEY, 0.5, (B, N, T, S))[..., 7], 1, 2)
    attended = kept & (np.arange(T) >= 7)[None, :, None]
    np.testing.assert_array_equal(np.isposinf(attend(values, 0.5)).all(-1), attended)
    assert not np.isnan(attend(values, 0.5)).any()


@pytest.mark.parametrize("window", [2**31 - 1, (2**31 - 1, 2**40), np.int64(2**62)])
def test_a_window_beyond_the_sequence_is_no_window(window):
    def attend(window):
        return jdropout.dot_product_attention(
            QUERY, KEYS, VALUES, dropout_key=None, dropout_rate=0.0, local_window_size=window
        )

    np.testing.assert_allclose(attend(window), attend(None), rtol=1e-4, atol=1e-6)


def test_lengths_beyond_int32_are_whole_lengths(jax_64):
    def attend(lengths):
        return jdropout.dot_product_attention(
            QUERY, KEYS, VALUES, dropout_key=None, dropout_rate=0.0, key_value_seq_lengths=lengths
        )

    np.testing.assert_allclose(attend(np.array([2**63 - 1, 3])), attend(np.array([S, 3])))


@pytest.fixture
def jax_64():
    with jax.enable_x64(True):
        yield


def test_more_positions_than_are_counted_are_refused():
    with pytest.raises(ValueError, match=r"at most 2\*\*30 queries and keys, got .*2147483648"):
        jdropout.dot_product_attention(
            QUERY, KEYS, VALUES, dropout_key=KEY, dropout_rate=0.5, is_causal=True,
            start=(0, 0, 0, 0), global_shape=(B, N, T, 2**31),
        )  # fmt: skip


def test_evaluation_is_exported_with_symbolic_sizes():
    @jax.jit
    def evaluate(query, keys, values):
        return jdropout.dot_product_attention(
            query, keys, values, dropout_key=None, dropout_rate=0.5, deterministic=True
        )

    batch, length = jax.export.symbolic_shape("b, t")
    shapes = [jax.ShapeDtypeStruct((batch, n, N, H), jnp.float32) for n in (length, S, S)]
    exported = jax.export.export(evaluate)(*shapes)
    np.testing.assert_allclose(
        exported.call(QUERY, KEYS, VALUES), evaluate(QUERY, KEYS, VALUES), rtol=1e-5, atol=1e-6
    )

    def train(query, keys, values):
        return jdropout.dot_product_attention(
            query, keys, values, dropout_key=KEY, dropout_rate=0.5
        )

    with pytest.raises(ValueError, match="must have a static shape"):
        jax.export.export(jax.jit(train))(*shapes)
