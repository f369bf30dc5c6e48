"""The public API is what `data/public_api.txt` says.

After an intended change, `python tests/test_api.py` rewrites that file; review its diff.
Annotations are left out, since they render differently between versions of Python and JAX.
"""

import difflib
import importlib
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

SNAPSHOT = pathlib.Path(__file__).parent / "data" / "public_api.txt"
MODULES = (
    "jdropout",
    "jdropout.by_position",
    "jdropout.keys",
    "jdropout.schedules",
    "jdropout.uncertainty",
    "jdropout.testing",
    "jdropout.nnx",
    "jdropout.linen",
    "jdropout.equinox",
)


def lines() -> Iterator[str]:
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            yield from describe(f"{name}.{public}", getattr(module, public))


def describe(name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing):
        yield f"{name}{signature(thing.__init__)}"  # nnx hides it from the class itself
        yield f"{name}: class{sections(thing)}"
        for member in dir(thing):
            if member == "__call__" or (not member.startswith("_") and member != "setup"):
                yield from describe_member(f"{name}.{member}", thing, member)
    elif inspect.isfunction(thing):
        yield f"{name}{signature(thing)}"
        yield f"{name}: function{sections(thing)}"
    else:
        yield f"{name}: type"  # an alias, which renders differently between versions


def describe_member(name: str, owner: type, member: str) -> Iterator[str]:
    """Members that this library defines: not those of Flax."""
    thing = inspect.getattr_static(owner, member)
    function = thing.fget if isinstance(thing, property) else thing
    if not (getattr(function, "__module__", None) or "").startswith("jdropout"):
        return
    if isinstance(thing, property):
        yield f"{name}: property{sections(thing)}"
    else:
        yield from describe(name, thing)


def signature(function: Callable[..., Any]) -> str:
    parameters = [
        parameter.replace(annotation=parameter.empty, default=Written(parameter.default))
        if parameter.default is not parameter.empty
        else parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


class Written:
    """A default as the snapshot has it: without addresses, a function or class by its name."""

    def __init__(self, default: Any) -> None:
        name = getattr(default, "__qualname__", None)
        self.text = name or re.sub(r" at 0x[0-9a-f]+", "", repr(default))

    def __repr__(self) -> str:
        return self.text


def sections(thing: Any) -> str:
    """The sections of a docstring, with the error types that are listed."""
    found = ["" if thing.__doc__ else " undocumented"]
    parts = re.split(r"^(\w+):\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        errors = re.findall(r"^  (\w+):", text, re.MULTILINE) if heading == "Raises" else []
        found.append("; " + " ".join([heading, *errors]))
    return "".join(found)


def test_the_public_api_is_the_committed_one():
    committed, present = SNAPSHOT.read_text().splitlines(), list(lines())
    changes = [line for line in difflib.ndiff(committed, present) if line[0] != " "]
    assert not changes, "\n".join(
        ["the public API changed; if that is meant, run python tests/test_api.py", *changes]
    )


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n")
