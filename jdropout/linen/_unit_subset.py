"""Dropout of hidden units, or of heads, as a linen module."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen

from jdropout._flax import check_module, check_paths
from jdropout._subset import unit_subset
from jdropout._typing import Key
from jdropout.linen._wrapper import SubsetWrapper


class UnitSubset(SubsetWrapper, kw_only=True):
    """Layer of `jdropout.unit_subset`: computes k of the n hidden units, or heads, of a block.

    In a call the block's modules have kernels of the kept units only. The block must work with
    any number of units; `linen.MultiHeadDotProductAttention` does. It may contain dropout and
    variables of its own, but none that belongs to the units.

    Attributes:
      layer: block with the named modules.
      rate: fraction of units to drop, a number in [0, 1].
      deterministic: if True, compute all units. Set it here or in the call, not in both. It must
        not be traced.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      incoming: paths of the modules that make the units, within the block's parameters, such as
        ``("Dense_0",)`` or ``("attention/query",)``: `linen.Dense` or `linen.DenseGeneral`. All
        their parameters have the units along `incoming_axis`.
      outgoing: paths of the modules that take the units. Their kernels have the units along
        `outgoing_axis`.
      incoming_axis: axis of the units, -1 by default; -2 for the heads of attention.
      outgoing_axis: axis of the units in the outgoing kernels, 0 by default.
      groups: number of groups of neighbouring units, of which each keeps the same number; 1 by
        default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> layer = jdropout.linen.UnitSubset(
      ...     linen.MultiHeadDotProductAttention(8),
      ...     0.5,
      ...     deterministic=False,
      ...     incoming=("query", "key", "value"),
      ...     outgoing=("out",),
      ...     incoming_axis=-2,
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> variables = layer.init(keys, jnp.ones((2, 10, 64)))
      >>> layer.apply(variables, jnp.ones((2, 10, 64)), rngs=keys).shape
      (2, 10, 64)

    References:
      Zhou, Ge, Wei, Zhou and Xu, "Scheduled DropHead: a regularization method for transformer
      models" (Findings of EMNLP 2020), section 3, for heads.
    """

    incoming: Sequence[str]
    outgoing: Sequence[str]
    incoming_axis: int = -1
    outgoing_axis: int = 0
    groups: int = 1

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_module("layer", self.layer, linen.Module)
        check_paths(self.incoming, self.outgoing)

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rng: Key | None = None,
        **options: Any,
    ) -> Any:
        """Computes the block with the kept units. In initialisation, with all.

        Args:
          inputs: input of the block.
          *args: further arguments of the block.
          deterministic: if True, compute all units. Set it here or in the constructor, not in both.
            It is not passed to the layer.
          rng: PRNG key to use instead of one from the stream.
          **options: keyword arguments of the layer.

        Returns:
          The result of the block.

        Raises:
          ValueError: if the kernels differ in their number of units, the flag was set both here
            and in the constructor or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number, or it or the flag is traced.
        """
        flag, key = self._static(deterministic, rng)
        if self.is_initializing():
            return self.layer(inputs, *args, **options)
        params = self.layer.variables["params"]
        sources = {path: dict(_params_at(params, path)) for path in self.incoming}
        sinks = {path: _params_at(params, path)["kernel"] for path in self.outgoing}

        def block(sources: Any, sinks: Any, x: Any) -> Any:
            replaced = {
                **sources,
                **{path: {**_params_at(params, path), "kernel": sinks[path]} for path in sinks},
            }
            inside = {(*self.layer.path, *path.split("/")): replaced[path] for path in replaced}
            with linen.intercept_methods(_WithParams(inside)):
                return self.layer(x, *args, **options)

        return unit_subset(
            key,
            block,
            sources,
            sinks,
            inputs,
            self.rate,
            incoming_axis=self.incoming_axis,
            outgoing_axis=self.outgoing_axis,
            groups=self.groups,
            deterministic=flag,
        )


def _params_at(params: Any, path: str) -> Any:
    at = params
    for part in path.split("/"):
        at = at.get(part) if hasattr(at, "get") else None
    if not hasattr(at, "get") or "kernel" not in at:
        raise ValueError(
            f"layer must have parameters with a kernel at {path!r}, got {sorted(params)}. Write "
            "the names that lead to it, such as 'Dense_0' or 'attention/query'."
        )
    return at


class _WithParams:
    """Intercepts modules at some paths, and runs copies of them with other parameters.

    A module's own parameters cannot be replaced, because it checks their shapes.
    """

    def __init__(self, params: dict[tuple[str, ...], Any]) -> None:
        self.params = params

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        params = None if module.scope is None else self.params.get(module.path)
        if params is None or context.method_name != "__call__":
            return method(*args, **kwargs)
        features = module.features
        shape = params["kernel"].shape
        size = shape[-len(features) :] if isinstance(features, Sequence) else shape[-1]
        copy = module.clone(features=size, parent=None, name=None)
        return copy.apply({"params": params}, *args, **kwargs)
