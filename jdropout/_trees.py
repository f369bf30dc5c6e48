"""Trees of arrays, in which every leaf has a path and a key of its own."""

from typing import Any

import jax

from jdropout._new_draw import draws
from jdropout._typing import Key, Rate
from jdropout.keys import at_site


def leaves_with_sites(tree: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    """The leaves, each with its path as a site: names and indices.

    The array of a Flax variable is the attribute ``value`` of a leaf of the model's state, and has
    the path of that leaf, which it also has in a tree of dictionaries.
    """
    leaves = jax.tree.flatten_with_path(tree)[0]
    sites = [tuple(map(_part, path)) for path, _ in leaves]
    parents = [site[:-1] for site in sites]
    return [
        (site[:-1] if _is_value(path) and parents.count(site[:-1]) == 1 else site, leaf)
        for site, (path, leaf) in zip(sites, leaves, strict=True)
    ]


def leaf_key(
    key: Key | None,
    site: tuple[str | int, ...],
    rate: Rate,
    deterministic: bool | jax.Array,
    precision: int | None,
) -> Key | None:
    """The key of a leaf, if a mask is drawn; a tree that is a single array has the key itself."""
    if not site or not draws(rate, deterministic, precision):
        return key
    return None if key is None else at_site(key, site)  # the leaf says that it is missing


def _part(entry: Any) -> str | int:
    for attribute in ("key", "idx", "name"):  # of a mapping, a sequence, an object
        if hasattr(entry, attribute):
            part = getattr(entry, attribute)
            index = isinstance(part, int) and not isinstance(part, bool) and 0 <= part < 2**32
            return part if index else str(part)
    return str(entry)


def _is_value(path: tuple[Any, ...]) -> bool:
    return len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
