"""Dropouts that `audit` should find, and guises of the programs that they are in."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

import jdropout

RATE = 0.25


def by_hand(key, x, rate=RATE):
    """The dropout of Flax, Equinox and Haiku."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def by_product(key, x, rate=RATE):
    return x * jax.random.bernoulli(key, 1 - rate, x.shape).astype(x.dtype) / (1 - rate)


def by_dropped(key, x, rate=RATE):
    return jnp.where(jax.random.bernoulli(key, rate, x.shape), 0.0, x) / (1 - rate)


@jax.custom_vjp
def with_recomputed_mask(key, x):
    return by_hand(key, x)


with_recomputed_mask.defvjp(
    lambda key, x: (by_hand(key, x), jax.random.key_data(key)),
    lambda words, cotangent: (None, by_hand(words, cotangent)),
)
OURS = functools.partial(jdropout.dropout, rate=RATE)
DROPOUTS = {
    "ours": OURS,
    "by hand": by_hand,
    "by product": by_product,
    "by dropped": by_dropped,
    "custom_vjp": with_recomputed_mask,
}


def assert_found(expected, number_of_sites, function, *args, **kwargs):
    """Compares the whole outcome: codes with their sites, and the number of all sites."""
    report = jdropout.audit(function, *args, **kwargs)
    assert [(finding.code, finding.sites) for finding in report.findings] == expected
    assert len(report.sites) == number_of_sites
    return report


def traced_before(function):
    jitted = jax.jit(function)
    jitted.trace(jax.random.key(0), jnp.ones((8, 16)))
    return jitted


def with_custom_jvp(function):
    wrapped = jax.custom_jvp(function, nondiff_argnums=(0,))
    wrapped.defjvp(
        lambda key, primals, tangents: jax.jvp(functools.partial(function, key), primals, tangents)
    )
    return lambda key, x: wrapped(key, x)


def gradient(function):
    return jax.grad(lambda key, x: function(key, x).sum(), argnums=1)


NAMES = jax.checkpoint_policies
POLICIES = {
    "everything": NAMES.everything_saveable,
    "nothing": NAMES.nothing_saveable,
    "these names": NAMES.save_only_these_names("a"),
}
GUISES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "traced before": traced_before,
    "grad": gradient,
    "jit of grad of jit": lambda f: jax.jit(gradient(jax.jit(f))),
    "value_and_grad": lambda f: jax.value_and_grad(lambda k, x: f(k, x).sum(), 1),
    "vjp": lambda f: lambda k, x: jax.vjp(functools.partial(f, k), x)[1](x),
    "jvp": lambda f: lambda k, x: jax.jvp(functools.partial(f, k), (x,), (x,)),
    "grad of grad": lambda f: gradient(gradient(lambda k, x: f(k, x) ** 3)),
    "checkpoint": jax.checkpoint,
    "grad of checkpoint": lambda f: gradient(jax.checkpoint(f)),
    "grad of checkpoint of checkpoint": lambda f: gradient(jax.checkpoint(jax.checkpoint(f))),
    **{
        f"checkpoint saving {name}": lambda f, policy=policy: jax.jit(
            gradient(jax.checkpoint(f, policy=policy))
        )
        for name, policy in POLICIES.items()
    },
    "cond": lambda f: gradient(lambda k, x: lax.cond(x[0, 0] > 0, f, lambda _, x: x, k, x)),
    "switch": lambda f: lambda k, x: lax.switch(1, [lambda _, x: x, f, lambda _, x: -x], k, x),
    "vmap over keys": lambda f: (
        lambda k, x: jax.vmap(f)(jax.random.split(k, 3), jnp.stack([x] * 3))
    ),
    "map over keys": lambda f: lambda k, x: lax.map(lambda k: f(k, x), jax.random.split(k, 3)),
    "grad of scan of checkpoint": lambda f: gradient(
        lambda k, x: lax.scan(
            jax.checkpoint(lambda x, k: (f(k, x), None)), x, jax.random.split(k, 3)
        )[0]
    ),
    "while_loop": lambda f: (
        lambda k, x: lax.while_loop(
            lambda carry: carry[0] < 3,
            lambda carry: (carry[0] + 1, f(jax.random.fold_in(k, carry[0]), carry[1])),
            (0, x),
        )
    ),
}
# JAX takes no second derivative of a custom_vjp, and no forward one.
NOT_CUSTOM = {(guise, "custom_vjp") for guise in ("jvp", "grad of grad", "custom_jvp")}

# Every guise of a program is another set of JAX's primitives around it. These four meet ours,
# one by hand and a custom_vjp; each of the others meets one of them, in turn.
CORE_GUISES = ("plain", "grad", "vmap over keys", "grad of scan of checkpoint")


def in_turn(*lists, also=()):
    """Every combination of the first lists, with one value each of the last; and some more."""
    *lists, last = lists
    combinations = enumerate(itertools.product(*lists))
    made = [(*values, last[number % len(last)]) for number, values in combinations]
    return list(dict.fromkeys([*made, *also]))
