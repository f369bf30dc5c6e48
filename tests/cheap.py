"""Cheap replacements for tests, whose time is mostly compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# For programs that run once: LLVM spends most of a compilation on optimising them. Eager calls, and
# the tests of the law, are compiled as users' programs are.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Flax's default initializers and jax.random.normal compile an inverse error function per shape.
UNIFORM = nnx.initializers.uniform(1.0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
