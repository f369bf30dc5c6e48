"""Trees of arrays, in which every leaf has a path of its own."""

from typing import Any

import jax


def leaves_with_sites(tree: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    """The leaves, each with its path as a site of names and indices.

    In a Flax state an array is the attribute ``value`` of a variable. Its site is the variable's
    path, the same as in a tree of dictionaries.
    """
    leaves = jax.tree.flatten_with_path(tree)[0]
    sites = [tuple(map(_part, path)) for path, _ in leaves]
    parents = [site[:-1] for site in sites]
    return [
        (site[:-1] if _is_value(path) and parents.count(site[:-1]) == 1 else site, leaf)
        for site, (path, leaf) in zip(sites, leaves, strict=True)
    ]


def _part(entry: Any) -> str | int:
    for attribute in ("key", "idx", "name"):  # mapping, sequence, object
        if hasattr(entry, attribute):
            part = getattr(entry, attribute)
            index = isinstance(part, int) and not isinstance(part, bool) and 0 <= part < 2**32
            return part if index else str(part)
    return str(entry)


def _is_value(path: tuple[Any, ...]) -> bool:
    return len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
