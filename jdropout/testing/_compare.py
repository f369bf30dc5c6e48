"""Compares pytrees bit by bit, and puts the first difference into words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _law
from jdropout._values import type_name


class Leaf(NamedTuple):
    """A leaf of a tree, copied to the host."""

    dtype: str
    """The dtype that the user sees, which for a typed key is not the dtype of its words."""
    values: np.ndarray


def on_host(tree: Any) -> dict[str, Leaf]:
    """Copies of all leaves by path. Safe even if the originals are donated."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = ((f"result{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves)
    return {name: _leaf(name, leaf) for name, leaf in named}


def difference(
    expected: dict[str, Leaf], actual: dict[str, Leaf], origin: str, rtol: float | None = None
) -> str | None:
    """Describes the first leaf that differs; None if none does.

    ``origin`` names the source of ``expected``, such as "in run 1". Floating-point values may
    differ by ``rtol`` times the largest magnitude of their leaf.
    """
    for name in sorted(expected.keys() ^ actual.keys()):
        return f"{name} is only there {origin if name in expected else f'not {origin}'}"
    for name, want in expected.items():
        got = actual[name]
        if want.dtype != got.dtype or want.values.shape != got.values.shape:
            return (
                f"{name} has dtype {got.dtype} and shape {got.values.shape}, but {want.dtype} and "
                f"{want.values.shape} {origin}"
            )
        differs = _differs(want.values, got.values, rtol)
        if differs.any():
            index = first_index(differs)
            return (
                f"{name} differs in {np.count_nonzero(differs)} of {differs.size} elements, first "
                f"at {index}: {got.values[index]!s}, but {want.values[index]!s} {origin}"
            )
    return None


def first_index(chosen: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(chosen)[0])


def _leaf(name: str, leaf: Any) -> Leaf:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        gathered = jax.device_put(leaf, min(leaf.devices(), key=lambda device: device.id))
        words = np.array(_law.key_words(gathered))
        return Leaf(str(leaf.dtype), words.reshape(*leaf.shape, -1))
    _check_comparable(name, leaf)
    values = np.array(leaf)
    return Leaf(str(values.dtype), values)


def _differs(want: np.ndarray, got: np.ndarray, rtol: float | None) -> np.ndarray:
    if rtol is None or not jnp.issubdtype(want.dtype, jnp.inexact):
        want_bytes, got_bytes = (
            np.frombuffer(values.tobytes(), np.uint8).reshape(*values.shape, values.dtype.itemsize)
            for values in (want, got)
        )
        return (want_bytes != got_bytes).any(axis=-1)
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    want, got = want.astype(wide), got.astype(wide)
    size = np.abs(want[np.isfinite(want)]).max(initial=0)
    return ~np.isclose(got, want, rtol=0, atol=rtol * size, equal_nan=True)


def _check_comparable(name: str, leaf: Any) -> None:
    kinds = jax.Array | np.ndarray | np.generic | bool | int | float | complex | str | bytes
    if not isinstance(leaf, kinds) or np.asarray(leaf).dtype.hasobject:
        raise TypeError(
            f"{name} must be an array, a number or a string to be compared, got {type_name(leaf)}. "
            "Return parameters and losses, for example nnx.state(model)."
        )
