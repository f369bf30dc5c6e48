"""Asserts that derivatives use the mask of the forward pass."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jdropout._values import check_flag, check_function
from jdropout.testing import _compare
from jdropout.testing._checks import check_floating, check_like_input


def assert_backward_uses_forward_mask(
    fn: Callable[[jax.Array], jax.Array], x: ArrayLike, *, forward_mode: bool = True
) -> None:
    """Asserts that the derivatives of a dropout use the mask and the scale of its output.

    `fn` must be dropout with a fixed key, that is, linear and elementwise: ``fn(x) = d * x``
    with a constant ``d`` that is 0 where an element is dropped. Its Jacobian is then the
    diagonal of ``d = fn(1)`` as well. The products of this Jacobian with ones and with other
    values are checked for `jax.vjp` of ``fn`` and of ``jax.checkpoint(fn)``, and for `jax.jvp`
    of ``fn``, each as it is and under `jax.jit`. Zeros must match exactly, other values up to
    four roundings in the dtype.

    A backward pass with a different mask differs in about ``2 * rate * (1 - rate)`` of all
    elements, so a few dozen elements are enough.

    Args:
      fn: function of one array, such as ``lambda x: dropout(key, x, 0.5)``, wrapped in whatever
        you want to test.
      x: array to differentiate at, with a floating-point dtype.
      forward_mode: if True, check `jax.jvp` too, which a `jax.custom_vjp` does not support.

    Raises:
      AssertionError: if a derivative uses another mask or scale; names the transformation and
        the element.
      TypeError: if `x` is not a floating-point array.
      ValueError: if `fn` is not linear and elementwise with a fixed mask, changes the shape, or
        drops nothing or everything at x's shape.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.testing import assert_backward_uses_forward_mask
      >>> key = jax.random.key(0)
      >>> layer = jax.checkpoint(lambda x: jdropout.dropout(key, x, 0.5))
      >>> assert_backward_uses_forward_mask(layer, jnp.ones((8, 16)))

    References:
      Griewank and Walther, "Evaluating derivatives" (SIAM, 2008), section 3, for the two modes.
    """
    check_function("fn", fn)
    forward_mode = check_flag("forward_mode", forward_mode)
    x = check_floating(x)
    dtype = check_like_input("fn(x)", jax.eval_shape(fn, x), x)
    factors = _wide(fn(jnp.ones_like(x)))
    rounding = 4 * max(float(jnp.finfo(x.dtype).eps), float(jnp.finfo(dtype).eps))

    def wrong(product: jax.Array, vector: np.ndarray) -> np.ndarray:
        got, want = _wide(product), factors * vector
        return ~((np.abs(got - want) <= rounding * np.abs(want)) & ((got == 0) == (want == 0)))

    vectors = {"ones": np.ones(x.shape), "other values": _other_values(x.shape)}
    for vector in (np.zeros(x.shape), *vectors.values()):
        _check_linear(wrong(fn(jnp.asarray(vector, x.dtype)), vector))
    _check_some_dropped(factors)

    def vjp(function: Callable[..., jax.Array], x: jax.Array, vector: jax.Array) -> jax.Array:
        return jax.vjp(function, x)[1](vector.astype(dtype))[0]

    def jvp(function: Callable[..., jax.Array], x: jax.Array, vector: jax.Array) -> jax.Array:
        try:
            return jax.jvp(function, (x,), (vector,))[1]
        except TypeError as error:
            error.add_note("forward_mode=False leaves jax.jvp out.")
            raise

    rematerialised = jax.checkpoint(fn)
    products = {
        "the vjp of fn": functools.partial(vjp, fn),
        "the vjp of jax.checkpoint(fn)": functools.partial(vjp, rematerialised),
    }
    if forward_mode:
        products["the jvp of fn"] = functools.partial(jvp, fn)
    for (what, product), compiled in itertools.product(products.items(), (False, True)):
        run = jax.jit(product) if compiled else product
        for name, vector in vectors.items():
            got = run(x, jnp.asarray(vector, x.dtype))
            differs = wrong(got, vector)
            if differs.any():
                index = _compare.first_index(differs)
                kind = "scale" if ((_wide(got) == 0) == (factors == 0)).all() else "mask"
                raise AssertionError(
                    f"{what}{' under jax.jit' if compiled else ''} has not the {kind} of fn: with "
                    f"{name}, it differs in {np.count_nonzero(differs)} of {differs.size} "
                    f"elements, first at {index}: {_wide(got)[index]:g} instead of "
                    f"{factors[index] * vector[index]:g}."
                )


def _other_values(shape: tuple[int, ...]) -> np.ndarray:
    """Values whose neighbours differ in sign and size; never 0, and exact in every dtype."""
    index = np.arange(math.prod(shape)).reshape(shape)
    return (1 + index % 4 / 4) * np.where(index % 3, 1, -1)


def _wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _check_linear(wrong: np.ndarray) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            "fn must be linear and elementwise with a fixed mask, fn(x) = fn(1) * x, which does "
            f"not hold in {np.count_nonzero(wrong)} of {wrong.size} elements, first at {index}. "
            "Pass the dropout alone, without the layers around it, and with a fixed key."
        )


def _check_some_dropped(factors: np.ndarray) -> None:
    kept = np.count_nonzero(factors)
    if kept in (0, factors.size):
        raise ValueError(
            f"fn keeps {kept} of {factors.size} elements, so its mask cannot be told from "
            "another. Pass a larger x and a rate such as 0.5, and switch dropout on "
            "(deterministic=False)."
        )
