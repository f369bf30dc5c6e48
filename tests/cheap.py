"""Cheap replacements for tests, whose time is mostly compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# With the emitters that users have; see conftest.py. JAX 0.11 and later have no others.
_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None
users_jit = functools.partial(jax.jit, compiler_options=_EMITTERS)

# Flax's default initializers and jax.random.normal compile an inverse error function per shape.
UNIFORM = nnx.initializers.uniform(1.0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
