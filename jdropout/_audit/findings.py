"""What an audit has against the sites that it found."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jdropout._audit.program import Program
from jdropout._audit.report import FIXES, AuditedSite, Finding
from jdropout._audit.values import MeshAxis, Place, rows_equal

_EVALUATION = {"eval", "evaluate", "evaluation", "infer", "inference", "predict", "prediction"}
_EVALUATION |= {"test", "valid", "validate", "validation"}
_ON_PURPOSE = {"bayesian", "mc", "monte", "uncertainty"}


def find(name: str, program: Program, sites: Sequence[AuditedSite]) -> Iterator[Finding]:
    yield from _find_reuse(program)
    for i, (site, place) in enumerate(zip(sites, program.places, strict=True)):
        for code, message in _complaints(name, site, place, program):
            yield Finding(code, (i,), message, FIXES[code])


def _find_reuse(program: Program) -> Iterator[Finding]:
    """Compares the keys of all pairs of sites; each site is named once for each code."""
    groups: dict[Any, list[int]] = {}
    for i, place in enumerate(program.places):
        if place.key is not None:
            groups.setdefault(place.key.number, []).append(i)
    same: dict[Any, list[int]] = {}
    for number, members in groups.items():
        together = _not_exclusive(members, program.places)
        if together:
            yield Finding("key-reused", together, "their keys are the same.", FIXES["key-reused"])
        first = program.places[members[0]].key
        if first is not None and first.known is not None:
            words = np.asarray(first.known).tobytes()
            same.setdefault(words, []).append(number)
    for numbers in same.values():
        if len(numbers) > 1:
            members = sorted(i for number in numbers for i in groups[number])
            yield Finding(
                "same-mask",
                tuple(members),
                "their keys were made in different ways, but have the same value.",
                FIXES["same-mask"],
            )


def _not_exclusive(members: list[int], places: Sequence[Place]) -> tuple[int, ...]:
    """Those of the places that can run in one execution with another one of them."""

    def exclusive(a: Place, b: Place) -> bool:
        return any(b.branches.get(cond, branch) != branch for cond, branch in a.branches.items())

    return tuple(
        i for i in members if any(j != i and not exclusive(places[i], places[j]) for j in members)
    )


def _complaints(
    name: str, site: AuditedSite, place: Place, program: Program
) -> Iterator[tuple[str, str]]:
    """Codes and messages of what is wrong with one site."""
    on = site.deterministic is False
    if on and site.rate is not None and site.effective_rate == 0:
        yield "rate-zero", f"its rate is {site.rate:g}: nothing is ever dropped."
    if on and site.rate == 1:
        yield "rate-one", "its rate is 1: everything is dropped."
    functions = (name, *site.functions)
    suspects = [function for function in functions if _is_evaluation(function)]
    if on and suspects and site.effective_rate != 0:
        yield "on-in-evaluation", f"it is on under a function named {suspects[0]!r}."
    yield from _complaints_about_sharing(site, place, program)
    if place.key is None:
        return
    inputs = {source for source in place.key.sources if isinstance(source, int)}
    if not place.key.sources:
        yield (
            "key-independent-of-step",
            "its key depends on no argument: every call has the same mask.",
        )
    elif inputs and program.steps and not inputs & (program.steps | program.advanced):
        steps = ", ".join(sorted(program.names[i] for i in program.steps))
        yield (
            "key-independent-of-step",
            f"its key depends on {', '.join(site.key_sources)}, but not on {steps}.",
        )
    for loop in place.loops:
        if loop not in place.key.sources:
            yield (
                "key-independent-of-iteration",
                f"all iterations of the {loop.describe()} around it have the same mask.",
            )


def _complaints_about_sharing(
    site: AuditedSite, place: Place, program: Program
) -> Iterator[tuple[str, str]]:
    if place.key is None:
        return
    apart = {x for x in place.result_sources - place.key.sources if isinstance(x, MeshAxis)}
    if apart and not (place.call is not None and program.calls[place.call].located):
        axes = ", ".join(sorted(repr(axis.name) for axis in apart))
        yield "shared-over-devices", f"all devices along {axes} have the same mask."
    if place.result_batch_axes > place.key_batch_axes or _equal_keys(place):
        yield "shared-over-batch", "all examples of a vmap have the same mask."
    rank = len(site.shape)
    heads = {4: 1, 3: 0}.get(rank) if site.kind == "attention" else None
    if site.kind == "bernoulli" and rank == 4 and {0, 1} <= set(site.shared_axes):
        heads = 1
    batch = None if heads == 0 or rank < 2 else 0
    if batch in site.shared_axes:
        yield "shared-over-batch", "all examples have the same mask."
    if heads in site.shared_axes:
        yield "shared-over-heads", "all heads have the same mask."


def _equal_keys(place: Place) -> bool:
    """Whether the keys of a vmap are known, and all the same."""
    assert place.key is not None
    known = place.key.known
    return place.key_batch_axes > 0 and known is not None and rows_equal(known)


def _is_evaluation(function: str) -> bool:
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", function).lower()))
    return bool(words & _EVALUATION) and not words & _ON_PURPOSE
