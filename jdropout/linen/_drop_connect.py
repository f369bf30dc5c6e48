"""DropConnect around a linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from flax import linen

from jdropout import _trees
from jdropout._drop_connect import check_select, check_selected, drop_connect_tree, matching_names
from jdropout._flax import check_module
from jdropout._typing import Flag, Key
from jdropout.keys import at_site
from jdropout.linen._dropout import RateLayer


class DropConnect(RateLayer, linen.Module):
    """Wraps any module so that its weights are dropped in training.

    In training the module is applied with the parameters that `jdropout.drop_connect_tree`
    makes from its own, in evaluation and initialisation as it is. Around a `linen.RNN` this is
    WeightDrop: one mask serves all time steps. The module's other collections are its own.

    A call takes the arguments of the module, plus ``deterministic`` and ``rng`` by keyword,
    which are not passed to the module.

    Attributes:
      module: module to call.
      rate: probability of dropping a weight, a number in [0, 1] or a (traced) floating-point
        scalar.
      select: which parameters to drop, by their paths in the module: a function of the path, or
        the trailing names of paths; ``("kernel",)`` by default. For only the recurrent weights
        of an LSTM use ``[f"h{gate}/kernel" for gate in "ifgo"]``.
      deterministic: if True, call the module as it is. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer = jdropout.linen.DropConnect(linen.Dense(8), 0.5, deterministic=False)
      >>> layer.init_with_output(keys, jnp.ones((2, 4)))[0].shape
      (2, 8)
      >>> layer = jdropout.linen.DropConnect(
      ...     linen.RNN(linen.OptimizedLSTMCell(8)), 0.5, deterministic=False,
      ...     select=[f"h{gate}/kernel" for gate in "ifgo"],
      ... )
      >>> params = layer.init(keys, jnp.ones((2, 10, 4)))
      >>> layer.apply(params, jnp.ones((2, 10, 4)), rngs=keys).shape
      (2, 10, 8)

    References:
      Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of neural networks using
      DropConnect" (ICML 2013), section 3; Merity, Keskar and Socher, "Regularizing and
      optimizing LSTM language models" (ICLR 2018), section 2, "Weight-dropped LSTM".
    """

    rng_position: ClassVar[int | None] = None

    module: linen.Module
    rate: float
    select: Callable[[str], bool] | Sequence[str] = ("kernel",)
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @linen.nowrap
    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_module("module", self.module, linen.Module)
        check_select(self.select)

    def __call__(
        self,
        *args: Any,
        deterministic: Flag | None = None,
        rng: Key | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the module, in training with dropped weights.

        Args:
          *args: positional arguments of the module.
          deterministic: if True, call the module as it is; a bool or a (traced) boolean scalar.
            Set it here or in the constructor, not in both. Not passed to the module.
          rng: PRNG key to use instead of one from the stream. Not passed to the module.
          **kwargs: further keyword arguments of the module.

        Returns:
          The result of the module.

        Raises:
          ValueError: if nothing is selected, the flag was set both here and in the constructor
            or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number, or a selected parameter is not a
            floating-point array.
        """
        if self.is_initializing():
            return self.module(*args, **kwargs)
        flag, key = self._resolve(deterministic, rng)
        drop = _Drop(key, self.rate, check_select(self.select), flag)
        y = with_params(self, drop, self.module, lambda module: module(*args, **kwargs))
        drop.check_selected()
        return y


def with_params(
    layer: linen.Module,
    change: Callable[[Any], Any],
    module: linen.Module,
    use: Callable[[Any], Any],
) -> Any:
    """Calls ``use`` with the module, its parameters replaced by ``change(params)``."""

    # The audit treats argument 0 as the owning module: `layer`, not the scope that this runs in.
    def changed(layer: linen.Module, variables: Any) -> Any:
        params = variables.get("params")
        return {**variables, "params": change(params)} if params else variables

    return linen.map_variables(use, "params", functools.partial(changed, layer))(module)


class _Drop:
    """Applies DropConnect in each of the scopes that hold a module's parameters.

    There is one scope, plus one for each module it holds that was made outside of it.
    """

    def __init__(self, key: Key | None, rate: Any, select: Any, flag: bool | jax.Array) -> None:
        self.key = key
        self.rate = rate
        self.select = select
        self.flag = flag
        self.paths: list[str] = []
        self.found: set[str] = set()
        self.scopes = 0

    def __call__(self, params: Any) -> Any:
        paths = ["/".join(map(str, site)) for site, _ in _trees.leaves_with_sites(params)]
        found = set().union(*(matching_names(self.select, path) for path in paths))
        self.paths += paths
        self.found |= found
        if not found:
            return params
        key = self.key if self.key is None or not self.scopes else at_site(self.key, self.scopes)
        self.scopes += 1
        return drop_connect_tree(
            key,
            params,
            self.rate,
            select=lambda path: bool(matching_names(self.select, path)),
            deterministic=self.flag,
        )

    def check_selected(self) -> None:
        check_selected(self.select, self.found, self.paths)
