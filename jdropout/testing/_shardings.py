"""Asserts that results do not depend on how arrays are sharded."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdropout._values import check_function, is_real, type_name
from jdropout.testing import _compare
from jdropout.testing._checks import check_any_leaves
from jdropout.testing._explain import explain, record_small
from jdropout.testing._recording import Recording


def assert_sharding_invariant(
    fn: Callable[..., Any],
    *args: Any,
    devices: Sequence[jax.Device] | None = None,
    mesh: Mesh | None = None,
    rtol: float | None = None,
) -> None:
    """Asserts that a function returns the same bits however its arguments are sharded.

    The function is called with everything on one device, and then with each argument in turn,
    and all at once, sharded in every way that puts one or two axes of a mesh on axes of the
    arrays. Arrays that a sharding does not divide, and keys, are replicated. All calls are made
    under ``jax.set_mesh``, the first one under a mesh of one device with the same axis names: a
    `jax.shard_map` that takes its mesh from there is compared with itself on one device.

    Args:
      fn: function to call as it is; pass ``jax.jit(fn)`` to test compiled code. A function that
        closes over a mesh computes the same thing whatever happens here; let it use the mesh
        that is set.
      *args: arguments of `fn`, pytrees of arrays; anything that is not an array is passed on.
      devices: devices to use, at least two; None for all. They form a mesh with axes ``a`` and
        ``b``, 2 x 4 for eight.
      mesh: mesh to use instead, with its axis names and types.
      rtol: None to compare bits. With a number, floating-point results may differ by that much
        times the largest magnitude in their array, as sums do when they are split differently:
        1e-5 is plenty in float32, and still detects a different mask.

    Raises:
      AssertionError: if a result differs; names the sharding, the leaf, the element and the line,
        for which `fn` is recorded on one device (a in the text) and with this sharding (b).
      TypeError: if a leaf of the result is not an array, a number or a string.
      ValueError: if there is only one device, nothing that can be sharded, or no result.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.testing import assert_sharding_invariant
      >>> layer = jax.jit(lambda key, x: jdropout.dropout(key, x, 0.1))
      >>> if len(jax.devices()) > 1:
      ...     assert_sharding_invariant(layer, jax.random.key(0), jnp.ones((16, 8)))

    References:
      JAX, "Distributed arrays and automatic parallelization", for meshes and shardings.
    """
    check_function("fn", fn)
    _check_rtol(rtol)
    _check_mesh(mesh, devices)
    mesh = _square_mesh(jax.devices() if devices is None else devices) if mesh is None else mesh
    placements = list(_placements(mesh, args))
    _check_any_placements(placements, mesh.shape)

    def run(mesh: Mesh, placement: _Placement) -> dict[str, _compare.Leaf]:
        with jax.set_mesh(mesh):
            result = fn(*_place(args, mesh, placement))
        return _compare.on_host(result)

    def recording(mesh: Mesh, placement: _Placement) -> Recording:
        with jax.set_mesh(mesh):
            return record_small(fn, *_place(args, mesh, placement))

    one_device = mesh.devices.reshape(-1)[:1].reshape((1,) * mesh.devices.ndim)
    single = Mesh(one_device, mesh.axis_names, axis_types=mesh.axis_types)
    expected = run(single, _Placement((), {}))
    check_any_leaves("fn", expected)
    for placement in placements:
        where = placement.describe(mesh)
        try:
            actual = run(mesh, placement)
        except Exception as error:
            error.add_note(f"This is fn with {where}; on one device it runs.")
            raise
        if difference := _compare.difference(expected, actual, "on one device", rtol):
            line = explain(
                functools.partial(recording, single, _Placement((), {})),
                functools.partial(recording, mesh, placement),
            )
            if rtol is not None and "first differs" in line:
                line += "\nWith rtol, this first difference may be of rounding alone."
            raise AssertionError(f"fn depends on the sharding: with {where}, {difference}.{line}")


class _Placement(NamedTuple):
    """Which arguments are sharded, and along which of their axes over which mesh axes."""

    arguments: tuple[int, ...]
    axes: dict[int, tuple[str, ...]]

    def fits(self, leaf: Any, mesh: Mesh) -> bool:
        return (
            isinstance(leaf, jax.Array | np.ndarray)
            and not _is_key(leaf)
            and leaf.ndim > max(self.axes, default=-1)
            and all(
                leaf.shape[axis] % math.prod(mesh.shape[name] for name in names) == 0
                for axis, names in self.axes.items()
            )
        )

    def spec(self) -> P:
        return P(*(self.axes.get(axis) for axis in range(max(self.axes, default=-1) + 1)))

    def describe(self, mesh: Mesh) -> str:
        names = " and ".join(f"args[{index}]" for index in self.arguments)
        return f"{names} sharded {self.spec()} over the mesh {dict(mesh.shape)}"


def _placements(mesh: Mesh, args: tuple[Any, ...]) -> Iterator[_Placement]:
    """Every sharding of one or two axes, of each argument alone and of all that it fits."""
    rank = max(
        (np.ndim(leaf) for leaf in jax.tree.leaves(args) if hasattr(leaf, "ndim")), default=0
    )
    for axes in _shardings(rank, [name for name, size in mesh.shape.items() if size > 1]):
        placement = _Placement((), axes)
        fitting = tuple(
            index
            for index, argument in enumerate(args)
            if any(placement.fits(leaf, mesh) for leaf in jax.tree.leaves(argument))
        )
        for index in fitting:
            yield _Placement((index,), axes)
        if len(fitting) > 1:
            yield _Placement(fitting, axes)


def _shardings(rank: int, names: Sequence[str]) -> Iterator[dict[int, tuple[str, ...]]]:
    for axis, name in itertools.product(range(rank), names):
        yield {axis: (name,)}
    for first, second in itertools.combinations(names, 2):
        for axis in range(rank):
            yield {axis: (first, second)}
        for one, other in itertools.permutations(range(rank), 2):
            yield {one: (first,), other: (second,)}


def _place(args: tuple[Any, ...], mesh: Mesh, placement: _Placement) -> list[Any]:
    """Copies the arrays to the devices of the mesh; copies, because fn may donate them."""

    def place(leaf: Any, chosen: bool) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        spec = placement.spec() if chosen and placement.fits(leaf, mesh) else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec), may_alias=False)

    return [
        jax.tree.map(functools.partial(place, chosen=index in placement.arguments), argument)
        for index, argument in enumerate(args)
    ]


def _square_mesh(devices: Sequence[jax.Device]) -> Mesh:
    count = len(devices)
    rows = max(size for size in range(1, math.isqrt(count) + 1) if count % size == 0)
    grid = np.array(devices, dtype=object).reshape(rows, count // rows)
    return Mesh(grid, ("a", "b"))


def _is_key(leaf: jax.Array | np.ndarray) -> bool:
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return typed or (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))


def _check_rtol(rtol: Any) -> None:
    if rtol is not None and not is_real(rtol):
        raise TypeError(
            f"rtol must be None or a number, got {rtol!r} of type {type_name(rtol)}."
            " Pass None to compare bits."
        )
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(
            f"rtol must be in [0, 1), got {rtol}. Pass None to compare bits, or 1e-5 for sums in "
            "float32."
        )


def _check_mesh(mesh: Any, devices: Any) -> None:
    """Returns the devices of a mesh or a sequence; all devices if both are None."""
    if mesh is not None and devices is not None:
        raise ValueError("mesh and devices were both given. A mesh has its devices: pass one.")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {type_name(mesh)}. Make one with jax.make_mesh."
        )
    if devices is None:
        devices = jax.devices() if mesh is None else mesh.devices.reshape(-1)
    elif not isinstance(devices, Sequence | np.ndarray) or not all(
        isinstance(device, jax.Device) for device in devices
    ):
        raise TypeError(
            f"devices must be a sequence of JAX devices, got {devices!r}. Pass jax.devices()."
        )
    if len(devices) < 2:
        raise ValueError(
            f"devices must hold at least 2 devices, got {len(devices)}: {[*devices]}. For eight on "
            "a CPU set the environment variable XLA_FLAGS=--xla_force_host_platform_device_count=8 "
            "before JAX starts, for example at the top of conftest.py."
        )


def _check_any_placements(placements: Any, sizes: Any) -> None:
    if not placements:
        raise ValueError(
            f"args hold no array with an axis that the mesh {dict(sizes)} divides, so nothing can "
            "be sharded. Pass arrays with sizes that are multiples of 8, or fewer devices."
        )
