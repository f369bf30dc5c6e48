"""What the README claims about cost: residuals, temporaries, compilations, imports."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import users_jit

import jdropout
import jdropout.keys


def residuals(function, x):
    return jax.tree.leaves(jax.vjp(function, x)[1])


def mask_key_words(key, digits=1):
    words = np.asarray(jax.random.key_data(key))
    return law_twin.mask_keys(words, digits)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_only_residual_is_the_masks_key(wrap, key):
    x = jnp.ones((64, 48))
    for own in (key, jax.random.key_data(key)):
        (leaf,) = residuals(wrap(lambda x, own=own: jdropout.dropout(own, x, 0.3)), x)
        np.testing.assert_array_equal(leaf, mask_key_words(key))


def test_the_only_residual_is_the_masks_key_for_every_dtype_and_option(key):
    dtypes = jnp.float32, jnp.bfloat16, jnp.complex64
    options = {}, {"precision": 32}, {"broadcast_dims": (0,)}

    @jax.jit
    def all_residuals(key):
        return [
            residuals(lambda x, own=own: jdropout.dropout(key, x, 0.3, **own), x)
            for x in (jnp.ones((64, 48), dtype) for dtype in dtypes)
            for own in options
        ]

    for (leaf,), own in zip(all_residuals(key), len(dtypes) * options, strict=True):
        digits = own.get("precision", 16) // 16
        np.testing.assert_array_equal(leaf, mask_key_words(key, digits))


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "checkpoint_dots"])
def test_checkpoint_policies_store_the_input_at_most(policy, key):
    x = jnp.ones((64, 48))
    policy = getattr(jax.checkpoint_policies, policy)
    checkpointed = jax.checkpoint(lambda x: jdropout.dropout(key, x, 0.3), policy=policy)
    assert sum(leaf.size for leaf in residuals(checkpointed, x)) <= 2


def test_no_residual_grows_with_the_input_when_the_rate_flag_and_start_are_traced(key):
    x = jnp.ones((64, 48))

    @jax.jit
    def f(x, rate, flag, start):
        return jdropout.dropout(
            key, x, rate, deterministic=flag, start=(start, 0), global_shape=(128, 48)
        )

    leaves = jax.eval_shape(lambda x: residuals(lambda x: f(x, 0.3, False, 7), x), x)
    assert sum(leaf.size for leaf in leaves) <= 2 + 2 + 3  # key, rate and flag, position


def test_flax_style_dropout_stores_its_mask():
    """The control for the two tests above: a stored mask is seen by them."""
    x = jnp.ones((64, 48))

    def flax_style(x):
        mask = jax.random.bernoulli(jax.random.key(0), 0.7, x.shape)
        return jnp.where(mask, x / 0.7, 0)

    assert max(leaf.size for leaf in residuals(flax_style, x)) == x.size


def gradient_temporaries(dropout, x, key):
    gradient = jax.grad(lambda x, key: jnp.sin(dropout(key, jnp.cos(x))).sum())
    compiled = users_jit(gradient).lower(x, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2048, 2048), (64, 250, 250), (1 << 22,)], ids=str)
def test_gradient_temporaries_are_at_most_a_bit_per_element(dtype, shape, key):
    x = jax.ShapeDtypeStruct(shape, dtype)
    n = np.prod(shape)
    ours = gradient_temporaries(lambda key, x: jdropout.dropout(key, x, 0.1), x, key)
    assert ours <= n / 8 + 2**20
    if (shape, dtype) != ((2048, 2048), jnp.float32):
        return

    def flax_style(key, x):
        mask = jax.random.bernoulli(key, 0.9, x.shape)
        return jnp.where(mask, x / jnp.asarray(0.9, x.dtype), jnp.zeros_like(x))

    assert gradient_temporaries(flax_style, x, key) >= n  # the control: at least a byte each


@functools.lru_cache
def network_temporaries(function):
    """Of the gradient of two layers: what the first pass leaves for the second one counts."""

    def loss(x, w, key):
        for index in range(LAYERS):
            x = jnp.tanh(function(jdropout.keys.at_site(key, index), x @ w))
        return x.sum()

    x, w = jax.ShapeDtypeStruct(NETWORK, jnp.float32), jnp.ones((NETWORK[-1],) * 2)
    key = jax.random.key(0)
    compiled = users_jit(jax.grad(loss, argnums=(0, 1))).lower(x, w, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes


NETWORK, LAYERS = (1024, 256), 2


def nothing(key, x):
    return x


# From JAX 0.12 on XLA:CPU cuts the quantile function of normal noise into several loops, and makes
# the uniforms of all layers before it needs them: three arrays a layer, for none in JAX 0.10.
NORMAL = 3.25 if jax.__version_info__ >= (0, 12) else 0


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda key, x: jdropout.dropout(key, x, 0.1), 0),
        (lambda key, x: jdropout.zoneout(key, x, 2 * x, 0.1), 0),
        (lambda key, x: jdropout.alpha_dropout(key, x, 0.1), 0),
        (lambda key, x: jdropout.gaussian_dropout(key, x, 0.1), NORMAL),
        (lambda key, x: jdropout.gaussian_noise(key, x, 0.1), NORMAL),
        (lambda key, x: jdropout.uniform_noise(key, x, 0.1), 0),
        (lambda key, x: jdropout.concrete_dropout(key, x, -2.0), 0),
        (lambda key, x: jdropout.variational_dropout(key, x, -2.0), NORMAL),
    ],
)
def test_a_network_keeps_a_bit_per_element_of_each_layer_at_most(function, arrays):
    """Also where the compiler sees both passes and could merge what they have in common."""
    n = np.prod(NETWORK)
    without = network_temporaries(nothing)
    assert network_temporaries(function) - without <= LAYERS * n * (4 * arrays + 1 / 8) + 2**14


def test_a_network_that_keeps_its_noise_is_seen():
    """The control for the test above."""
    n = np.prod(NETWORK)
    without = network_temporaries(nothing)
    noisy = network_temporaries(lambda key, x: x * jax.random.normal(key, x.shape))
    assert noisy - without > LAYERS * n


def test_one_trace_serves_all_keys():
    traces = 0

    @jax.jit
    def f(key, x):
        nonlocal traces
        traces += 1
        return jdropout.dropout(key, x, 0.5)

    for i in range(5):
        f(jax.random.key(i), jnp.ones((8, 8)))
    assert traces == 1


def test_layers_of_one_shape_share_one_trace_of_the_law(key):
    """48 layers must not trace the cipher 96 times: the mask is one jitted function."""

    def loss(x):
        for i in range(4):
            x = jdropout.dropout(jax.random.fold_in(key, i), x, 0.1)
        return x.sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 32))).as_text()
    assert text.count("func.func private @keep") == 1


def test_importing_the_package_imports_no_framework_on_top_of_jax():
    code = (
        "import sys, jax; before = set(sys.modules); import jdropout; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for framework in ("flax", "matplotlib", "optax", "sklearn", "rich"):
        assert f"'{framework}'" not in names
    assert "'jdropout'" in names
