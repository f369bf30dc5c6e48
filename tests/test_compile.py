"""Every public function compiles in a reasonable time, forward and backward, in a long program.

XLA:CPU may inline a cipher into whatever consumes its numbers. With JAX 0.12 LLVM then did not
finish within minutes for arrays of 4 x 4, though the same program with 64 x 64 took a second. So
the arrays here are that small, and what follows the functions is long. A child process compiles,
for a compilation cannot be interrupted.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jdropout

KEY = jax.random.key(0)
LIMIT = 240  # seconds for all programs, which take about 25 on an idle core
TOGETHER = 4  # functions in a program: what follows them is compiled once for all of them
STATE = jnp.full((4, 4), 0.5)


def consumer(x):
    """A normalisation and a quantile function: some hundred operations."""
    x = jax.nn.gelu(x)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)
    return jax.scipy.special.ndtri(jax.nn.sigmoid(x))


def words(key, x):
    tokens = jnp.arange(4, dtype=jnp.int32)[:, None]
    return x[jdropout.word_dropout(key, tokens, 0.3, replacement=1)[:, 0]]


def attention(key, x):
    x = x[None, :, None, :]
    return jdropout.dot_product_attention(x, x, x, dropout_key=key, dropout_rate=0.3)


def predicted(key, x):
    def model(key, x):
        return jdropout.dropout(key, x, 0.3, precision=32)

    return jdropout.mc_predict(model, key, x, num_samples=2, return_samples=True).mean


def two_passes(key, x):
    a, b = (jdropout.gaussian_noise(key, x, scale) for scale in (0.1, 0.2))
    return x + jdropout.r_drop_loss(a, b)[:, None]


# Functions of a key and x, by the name of the public function that they call.
PROGRAMS = {
    "alpha_dropout": lambda key, x: jdropout.alpha_dropout(key, x, 0.3, precision=32),
    "bias_dropout_add": lambda key, x: jdropout.bias_dropout_add(key, x, x[0], x, 0.3),
    "concrete_dropout": lambda key, x: jdropout.concrete_dropout(key, x, x),
    "dot_product_attention": attention,
    "drop_block": lambda key, x: jdropout.drop_block(key, x[None, ..., None], 0.3, block_size=2),
    "drop_connect": lambda key, x: jdropout.drop_connect(key, x, 0.3, precision=32),
    "drop_connect_tree": lambda key, x: jdropout.drop_connect_tree(
        key, {"w": x}, 0.3, select=["w"], precision=32
    )["w"],
    "drop_path": lambda key, x: jdropout.drop_path(key, x, 0.3, precision=32),
    "dropout": lambda key, x: jdropout.dropout(key, x, 0.3, precision=32),
    "dropout, traced": lambda key, x: jdropout.dropout(key, x, x[0, 0], precision=32),
    "dropout, 16 bits": lambda key, x: jdropout.dropout(key, x, 0.3),
    "dropout, a block": lambda key, x: jdropout.dropout(
        key, x, 0.3, start=(1, 0), global_shape=(9, 4), precision=32
    ),
    "dropout_add_norm": lambda key, x: jdropout.dropout_add_norm(key, x, x, 0.3, precision=32)[0],
    "embedding_dropout": lambda key, x: jdropout.embedding_dropout(key, x, 0.3, precision=32),
    "feature_alpha_dropout": lambda key, x: jdropout.feature_alpha_dropout(
        key, x, 0.3, precision=32
    ),
    "gaussian_dropout": lambda key, x: jdropout.gaussian_dropout(key, x, 0.3),
    "gaussian_noise": lambda key, x: jdropout.gaussian_noise(key, x, 0.3),
    "keep_indices": lambda key, x: x[jdropout.keep_indices(key, 0.5, 4)],
    "keep_mask": lambda key, x: (
        x * jdropout.keep_mask(key, 0.3, (4, 4), precision=32).astype(x.dtype)
    ),
    "layer_drop": lambda key, x: jdropout.layer_drop(
        key, lambda x: x + jnp.sin(x), x, 0.3, unbiased=True, precision=32
    ),
    "layer_subset": lambda key, x: jdropout.layer_subset(
        key, lambda p, x: x + jnp.sin(p * x), x, x[0], 0.5
    ),
    "locked_dropout": lambda key, x: jdropout.locked_dropout(key, x[None], 0.3, precision=32),
    "mc_predict": predicted,
    "multi_sample": lambda key, x: jdropout.multi_sample(
        lambda key, x: jdropout.gaussian_noise(key, x, 0.3), key, x, 2
    ),
    "patch_dropout": lambda key, x: jdropout.patch_dropout(key, x[:, :, None], 0.5)[0],
    "r_drop_loss": two_passes,
    "route_tokens": lambda key, x: jdropout.route_tokens(
        key, lambda x, positions: x + jnp.sin(x), x[:, :, None], 0.5
    ),
    "spatial_dropout": lambda key, x: jdropout.spatial_dropout(key, x[None], 0.3, precision=32),
    "standout": lambda key, x: jdropout.standout(key, x, x),
    "stochastic_depth": lambda key, x: jdropout.stochastic_depth(key, jnp.sin, x, 0.5),
    "targeted_dropout": lambda key, x: jdropout.targeted_dropout(
        key, x, 0.3, target_fraction=0.5, precision=32
    ),
    "unit_subset": lambda key, x: jdropout.unit_subset(
        key, lambda w, v, x: jnp.tanh(x @ w) @ v, x, x, x, 0.5
    ),
    "uniform_noise": lambda key, x: jdropout.uniform_noise(key, x, 0.3),
    "variational_dense": lambda key, x: jdropout.variational_dense(key, x, x, x),
    "variational_dropout": lambda key, x: jdropout.variational_dropout(key, x, x),
    "word_dropout": words,
    "zoneout": lambda key, x: jdropout.zoneout(key, STATE, x, 0.3, precision=32),
}
# These draw nothing.
OTHERS = {
    "AuditFinding",
    "AuditReport",
    "AuditedSite",
    "MCPrediction",
    "audit",
    "concrete_regularizer",
    "drop_block_gamma",
    "drop_path_rates",
    "effective_rate",
    "variational_kl",
    "variational_log_alpha",
}


def compile_all():
    for start in range(0, len(PROGRAMS), TOGETHER):
        names = list(PROGRAMS)[start : start + TOGETHER]
        print(*names, sep="; ", flush=True)

        def loss(x, names=names):
            x = jnp.tanh(x)
            results = [jnp.resize(PROGRAMS[name](KEY, x), (4, 4)) for name in names]
            return consumer(sum(results)).sum()

        jax.jit(jax.value_and_grad(loss)).lower(STATE).compile()


def test_every_public_function_is_here():
    assert {name.partition(",")[0] for name in PROGRAMS} | OTHERS == set(jdropout.__all__)


# Before it XLA:CPU never took long, and the child process takes half a minute.
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the limit is for JAX 0.12 or later")
def test_every_function_compiles_within_the_limit():
    try:
        result = subprocess.run(
            [sys.executable, __file__],
            cwd=pathlib.Path(jdropout.__file__).parent.parent,
            env=os.environ | {"XLA_FLAGS": ""},  # what users have
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        *_, started, _ = (error.stdout or b"\n").decode().split("\n")
        raise AssertionError(f"{LIMIT} s were not enough to compile {started!r}") from None
    assert result.stdout.replace("\n", "; ").split("; ") == [*PROGRAMS, ""]


if __name__ == "__main__":
    compile_all()
