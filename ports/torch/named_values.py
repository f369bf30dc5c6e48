"""Names what the modules of a model return, in Flax nnx and in PyTorch, and compares.

    with record_nnx(flax_model) as theirs:
        flax_model(x)                                # outside jax.jit: values are needed
    with record_torch(torch_model) as ours:
        torch_model(torch.tensor(x))
    print(first_difference(theirs, ours, 1e-9))

Names are the paths of the modules, with the number of the call: ``blocks.0.dropout#2`` is the third
call of the dropout in the first block. Both records are dictionaries of NumPy arrays, in the order
in which modules returned, innermost first. To compare two processes or two machines, save them:
`numpy.savez("theirs.npz", **theirs)`, and `dict(numpy.load("theirs.npz"))`.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, np.ndarray]


@contextlib.contextmanager
def record_torch(model: Any) -> Iterator[Record]:
    """Records the output of each call of a module in a `torch.nn.Module`."""
    record = _Record()
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: record.add(name, output.detach().cpu())
        )
        for name, module in model.named_modules()
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def record_nnx(model: Any) -> Iterator[Record]:
    """Records the output of each call of a module in a `flax.nnx.Module`."""
    from flax import nnx

    record = _Record()
    modules = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    names = {id(node): ".".join(map(str, path)) for path, node in modules}
    kinds = {type(node) for _, node in modules if callable(node)}
    own = {kind: vars(kind).get("__call__") for kind in kinds}
    running: list[Any] = []

    def recording(call: Any) -> Any:
        @functools.wraps(call)
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if running and running[-1] is self:  # super().__call__
                return call(self, *args, **kwargs)
            running.append(self)
            try:
                output = call(self, *args, **kwargs)
            finally:
                running.pop()
            if id(self) in names:
                record.add(names[id(self)], output)
            return output

        return recorded

    calls = {kind: kind.__call__ for kind in kinds}
    try:
        for kind, call in calls.items():
            kind.__call__ = recording(call)
        yield record
    finally:
        for kind, call in own.items():
            if call is None:
                del kind.__call__
            else:
                kind.__call__ = call


class _Record(Record):
    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, name: str, value: Any) -> None:
        self[f"{name}#{self.counts[name]}"] = np.asarray(value).copy()
        self.counts[name] += 1


class Difference(NamedTuple):
    """The first value that differs, and the last one before it that does not."""

    name: str
    deviation: float
    before: str | None

    def __str__(self) -> str:
        where = "at the first value" if self.before is None else f"{self.before} agrees"
        return f"{self.name} differs by {self.deviation:.1e} of its largest element; {where}"


def first_difference(
    theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], tolerance: float
) -> Difference | None:
    """The first value, in the order of `theirs`, that differs by more than a tolerance.

    Values that only one side has are skipped, such as those of a module that the other one does
    not need.
    """
    before = None
    for name in theirs:
        if name in ours:
            difference = deviation(theirs[name], ours[name])
            if not difference <= tolerance:
                return Difference(name, difference, before)
            before = name
    if before is None:
        raise ValueError(f"the records have no name in common: {[*theirs][:3]}, {[*ours][:3]}.")
    return None


def deviation(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference of two elements, over the largest element; infinite if shapes differ.

    Axes may be split, as attention splits the features into heads.
    """
    if np.size(theirs) != np.size(ours):
        return np.inf
    theirs, ours = (np.asarray(x, np.float64).reshape(-1) for x in (theirs, ours))
    largest = np.abs(theirs).max(initial=0)
    return float(np.abs(theirs - ours).max(initial=0) / (largest or 1))
