"""Cheap replacements for tests, whose time is mostly compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# For large programs that run once, such as attention with its gradient: XLA's older emitters
# compile them three times as fast.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})

# Flax's default initializers and jax.random.normal compile an inverse error function per shape.
UNIFORM = nnx.initializers.uniform(1.0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
