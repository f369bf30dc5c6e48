"""DropConnect around an nnx module."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._drop_connect import check_select, drop_connect_tree
from jdropout._typing import Flag
from jdropout.nnx._dropout import Dropout


class DropConnect(Dropout):
    """Any module with weights that are dropped in training.

    In training the module is called with the parameters that `jdropout.drop_connect_tree` makes of
    its own, in evaluation as it is. Around an `nnx.RNN` it is WeightDrop: one mask serves all time
    steps. What else the module updates, such as batch statistics and random streams, it updates.

    Args:
      module: the module to call.
      rate: probability of dropping a weight, a number in [0, 1].
      select: which parameters to drop, by the paths that they have in the module: a function of
        the path, or the last names of paths. For the recurrent weights alone of most of Flax's
        cells it is ``["dense_h/kernel"]``.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`; in the call if nothing is selected.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jdropout.nnx.DropConnect(nnx.Linear(4, 8, rngs=rngs), 0.5, rngs=rngs)
      >>> layer(jnp.ones((2, 4))).shape
      (2, 8)
      >>> lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=rngs))
      >>> layer = jdropout.nnx.DropConnect(lstm, 0.5, select=["dense_h/kernel"], rngs=rngs)
      >>> layer(jnp.ones((2, 10, 4))).shape
      (2, 10, 8)

    References:
      As for `jdropout.drop_connect` and `jdropout.drop_connect_tree`.
    """

    _arguments = "module, rate"

    def __init__(
        self,
        module: Any,
        rate: float,
        *,
        select: Callable[[str], bool] | Sequence[str] = ("kernel",),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.module = module
        self.select = check_select(select)

    def __call__(
        self,
        *args: Any,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the module, in training with dropped weights.

        Args:
          *args: positional arguments of the module.
          deterministic: as for `Dropout`; the module does not see it.
          rngs: as for `Dropout`; the module does not see it.
          **kwargs: further keyword arguments of the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: if nothing is selected, or as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rngs)

        def drop(params: Any) -> Any:
            return drop_connect_tree(key, params, self.rate, select=self.select, deterministic=flag)

        return with_params(drop, self.module, lambda module: module(*args, **kwargs))


def with_params(change: Callable[[Any], Any], module: Any, use: Callable[[Any], Any]) -> Any:
    """Uses a module with changed parameters; its other variables are the very ones that it has.

    Variables that it makes in the meantime, as ``sow`` does, are handed over afterwards.
    """
    parts: Any = nnx.split(module, nnx.Param, ...)  # mypy cannot read its type
    graph, params, others = parts
    before: list[Any] = list(nnx.to_flat_state(params))
    after: list[Any] = list(nnx.to_flat_state(change(params)))
    changed = [_value(a[1]) is not _value(b[1]) for a, b in zip(before, after, strict=True)]
    if not any(changed):
        return use(module)
    flat = [new if is_new else old for old, new, is_new in zip(before, after, changed, strict=True)]
    twin = nnx.merge(graph, nnx.from_flat_state(flat), others)
    result = use(twin)
    known = {path for path, _ in before} | set(nnx.to_flat_state(others).paths)
    made = [(path, v) for path, v in nnx.to_flat_state(nnx.state(twin)) if path not in known]
    if made:
        nnx.update(module, nnx.from_flat_state(made))
    return result


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable
