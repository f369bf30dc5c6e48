"""linen modules that wrap another one and drop its weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen

from jdropout import _trees
from jdropout._drop_connect import check_select, check_selected, drop_connect_tree
from jdropout._shared import embedding_dropout
from jdropout._typing import Flag, Key
from jdropout.keys import at_site
from jdropout.linen._dropout import RateLayer


class DropConnect(RateLayer, linen.Module):
    """Any module with weights that are dropped in training.

    In training the module is applied with the parameters that `jdropout.drop_connect_tree` makes
    of its own, in evaluation and initialisation as it is. Around a `linen.RNN` it is WeightDrop:
    one mask serves all time steps. The other collections of the module are its own.

    The call has the arguments of the module, and ``deterministic`` and ``rng`` by keyword, which
    the module does not see.

    Attributes:
      module: the module to call.
      rate: probability of dropping a weight, a number in [0, 1].
      select: which parameters to drop, by the paths that they have in the module: a function of
        the path, or the last names of paths; ``("kernel",)`` by default. For the recurrent weights
        alone of an LSTM it is ``[f"h{gate}/kernel" for gate in "ifgo"]``.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.

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
      As for `jdropout.drop_connect` and `jdropout.drop_connect_tree`.
    """

    rng_position = None

    module: linen.Module
    rate: float
    select: Callable[[str], bool] | Sequence[str] = ("kernel",)
    deterministic: bool | None = None
    rng_collection: str = "dropout"

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
          deterministic: as for `Dropout`; the module does not see it.
          rng: as for `Dropout`; the module does not see it.
          **kwargs: further keyword arguments of the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: if nothing is selected, or as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        if self.is_initializing():
            return self.module(*args, **kwargs)
        flag, key = self._resolve(deterministic, rng)
        drop = _Drop(key, self.rate, check_select(self.select), flag)
        y = _with_params(self, drop, self.module, lambda module: module(*args, **kwargs))
        drop.check_selected()
        return y


class EmbeddingDropout(RateLayer, linen.Module):
    """An embedding whose words are dropped in training, wherever they occur.

    Looks up in, and attends to, the table that `jdropout.embedding_dropout` makes of the
    embedding's own. Every call of either method takes a key: for one mask in both pass them one
    key as ``rng``.

    Attributes:
      embed: a `linen.Embed`.
      rate: probability of dropping a word, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> embed = linen.Embed(8, 2, embedding_init=linen.initializers.ones)
      >>> layer = jdropout.linen.EmbeddingDropout(embed, 0.5, deterministic=False)
      >>> tokens = jnp.array([[1, 5, 1], [5, 2, 0]])
      >>> params = layer.init(jax.random.key(0), tokens)
      >>> layer.apply(params, tokens, rngs={"dropout": jax.random.key(0)})[..., 0]
      Array([[0., 2., 0.],
             [2., 0., 2.]], dtype=float32)

    References:
      As for `jdropout.embedding_dropout`.
    """

    drawing_methods = ("__call__", "attend")

    embed: linen.Module
    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Looks tokens up.

        Args:
          inputs: array of integers of any shape.
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed(inputs), deterministic, rng)

    def attend(
        self, query: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Products of queries with all words; those with dropped ones are 0.

        Args:
          query: array of shape (..., features).
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of shape (..., vocabulary).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed.attend(query), deterministic, rng)

    @linen.nowrap
    def _dropped(self, use: Callable[[Any], Any], deterministic: Any, rng: Any) -> Any:
        if self.is_initializing():
            return use(self.embed)
        flag, key = self._resolve(deterministic, rng)

        def drop(params: Any) -> Any:
            return jax.tree.map(
                lambda table: embedding_dropout(key, table, self.rate, deterministic=flag), params
            )

        return _with_params(self, drop, self.embed, use)


def _with_params(
    layer: linen.Module,
    change: Callable[[Any], Any],
    module: linen.Module,
    use: Callable[[Any], Any],
) -> Any:
    """Uses a module with changed parameters."""

    # An audit takes the first argument for the owner: not the module, whose scope this runs in.
    def changed(layer: linen.Module, variables: Any) -> Any:
        params = variables.get("params")
        return {**variables, "params": change(params)} if params else variables

    return linen.map_variables(use, "params", functools.partial(changed, layer))(module)


class _Drop:
    """DropConnect in each of the scopes that a module's parameters lie in.

    It is one, unless the module holds others that were made outside of it, each with its own.
    """

    def __init__(self, key: Key | None, rate: Any, select: Any, flag: bool | jax.Array) -> None:
        self.key = key
        self.rate = rate
        self.select = select
        self.flag = flag
        self.paths: list[str] = []
        self.matched: set[str] = set()
        self.scopes = 0

    def __call__(self, params: Any) -> Any:
        paths = ["/".join(map(str, site)) for site, _ in _trees.leaves_with_sites(params)]
        self.paths += paths
        matched = {name for name in map(self.wanted, paths) if name is not None}
        if not matched:
            return params
        self.matched |= matched
        key = self.key if self.key is None or not self.scopes else at_site(self.key, self.scopes)
        self.scopes += 1
        return drop_connect_tree(
            key,
            params,
            self.rate,
            select=lambda path: self.wanted(path) is not None,
            deterministic=self.flag,
        )

    def wanted(self, path: str) -> str | None:
        """The name, or an empty one, that selects a path."""
        if callable(self.select):
            return "" if self.select(path) else None
        return next((name for name in self.select if f"/{path}".endswith(f"/{name}")), None)

    def check_selected(self) -> None:
        unmatched: list[str] | None
        if callable(self.select):
            unmatched = [] if self.matched else None
        else:
            unmatched = [name for name in self.select if name not in self.matched]
        check_selected(self.select, unmatched, self.paths)
