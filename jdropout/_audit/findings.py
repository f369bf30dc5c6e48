"""Rules that turn sites into findings."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jdropout._audit.program import Program
from jdropout._audit.report import FIXES, AuditedSite, AuditFinding
from jdropout._audit.values import MeshAxis, Place, rows_equal

_EVALUATION = {"eval", "evaluate", "evaluation", "infer", "inference", "predict", "prediction"}
_EVALUATION |= {"test", "valid", "validate", "validation"}
_ON_PURPOSE = {"bayesian", "mc", "monte", "uncertainty", "train"}


def find(name: str, program: Program, sites: Sequence[AuditedSite]) -> Iterator[AuditFinding]:
    yield from _find_reuse(program)
    yield from _find_off(sites)
    complaints: dict[tuple[str, str], list[int]] = {}
    for i, (site, place) in enumerate(zip(sites, program.places, strict=True)):
        for complaint in _complaints(name, site, place, program):
            complaints.setdefault(complaint, []).append(i)
    for (code, message), members in complaints.items():
        yield AuditFinding(code, tuple(dict.fromkeys(members)), message, FIXES[code])


def _find_reuse(program: Program) -> Iterator[AuditFinding]:
    """Finds sites that share a key, or have keys of equal value."""
    groups: dict[Any, list[int]] = {}
    for i, place in enumerate(program.places):
        if place.key is not None:
            groups.setdefault(place.key.number, []).append(i)
    same: dict[Any, list[int]] = {}
    for number, members in groups.items():
        together = _alike(members, program.places)
        if together:
            yield AuditFinding(
                "key-reused", together, "their keys are the same.", FIXES["key-reused"]
            )
        first = program.places[members[0]].key
        if first is not None and first.known is not None:
            words = np.asarray(first.known).tobytes()
            same.setdefault(words, []).append(number)
    for numbers in same.values():
        if len(numbers) > 1:
            members = sorted(i for number in numbers for i in groups[number])
            together = _alike(members, program.places)
            if not together:
                continue
            yield AuditFinding(
                "same-mask",
                together,
                "their keys were made in different ways, but have the same value.",
                FIXES["same-mask"],
            )


def _find_off(sites: Sequence[AuditedSite]) -> Iterator[AuditFinding]:
    """Finds sites that the flag switches off, while others are on."""
    on = {(site.path, site.location) for site in sites if _is_on(site)}
    off = [
        i
        for i, site in enumerate(sites)
        # A site that is on too belongs to an evaluation beside the training.
        if site.deterministic and site.rate and (site.path, site.location) not in on
    ]
    if on and off:
        code = "off-while-others-are-on"
        verb = "it is" if len(off) == 1 else "they are"
        message = f"{verb} switched off, while {len(on)} of the same program drop."
        yield AuditFinding(code, tuple(off), message, FIXES[code])


def _is_on(site: AuditedSite) -> bool:
    return not site.deterministic and site.effective_rate != 0


def _alike(members: list[int], places: Sequence[Place]) -> tuple[int, ...]:
    """The members that, in one execution, get the same bits as another member."""

    def exclusive(a: Place, b: Place) -> bool:
        return any(b.branches.get(cond, branch) != branch for cond, branch in a.branches.items())

    def disjoint(a: Place, b: Place) -> bool:
        """Whether they are different parts of one larger mask."""
        return bool(a.start and b.start) and a.start != b.start

    def alike(a: Place, b: Place) -> bool:
        return not exclusive(a, b) and not disjoint(a, b)

    return tuple(i for i in members if any(j != i and alike(places[i], places[j]) for j in members))


def _complaints(
    name: str, site: AuditedSite, place: Place, program: Program
) -> Iterator[tuple[str, str]]:
    """Codes and messages of everything wrong with one site."""
    on = site.deterministic is False
    if on and site.rate is not None and site.effective_rate == 0:
        yield "rate-zero", f"its rate is {site.rate:g}: nothing is ever dropped."
    if on and site.rate == 1:
        yield "rate-one", "its rate is 1: everything is dropped."
    functions = (name, *site.functions)
    suspects = [function for function in functions if _is_evaluation(function)]
    # A differentiated function is training, whatever its name: a model may be called `predict`.
    if on and suspects and site.effective_rate != 0 and "jvp(" not in place.scope:
        yield "on-in-evaluation", f"it is on under a function named {suspects[0]!r}."
    yield from _complaints_about_sharing(site, place, program)
    if place.key is None:
        return
    stale = _why_stale(site, place, program)
    if stale:
        yield "key-independent-of-step", stale
    for loop in place.loops:
        if loop not in place.key.sources:
            yield (
                "key-independent-of-iteration",
                f"all iterations of the {loop.describe()} around it have the same mask.",
            )


def _why_stale(site: AuditedSite, place: Place, program: Program) -> str:
    """Why a site's key is the same in every step; empty if it is not."""
    assert place.key is not None
    if not place.key.sources:
        return "its key depends on no argument: every call has the same mask."
    inputs = {source for source in place.key.sources if isinstance(source, int)}
    if inputs & (program.steps | program.advanced_inputs):
        return ""
    origin = ", ".join(site.key_sources) or "the loop alone"
    if program.steps:
        steps = ", ".join(program.names[i] for i in sorted(program.steps))
        return f"its key depends on {origin}, but not on {steps}."
    if inputs and inputs <= program.streams:
        return f"its key depends on {origin}, whose count the function does not pass on."
    return ""


def _complaints_about_sharing(
    site: AuditedSite, place: Place, program: Program
) -> Iterator[tuple[str, str]]:
    if place.key is None:
        return
    unseen = {x for x in place.result_sources - place.key.sources if isinstance(x, MeshAxis)}
    if unseen and not (place.call is not None and program.calls[place.call].located):
        axes = ", ".join(sorted(repr(axis.name) for axis in unseen))
        yield "shared-over-devices", f"all devices along {axes} have the same mask."
    if place.result_batch_axes > place.key_batch_axes or _equal_keys(place):
        yield "shared-over-batch", "all examples of a vmap have the same mask."
    rank = len(site.shape)
    attends = site.kind == "attention" or any(
        frame.function.rpartition(".")[2] == "dot_product_attention_weights"
        for frame in place.frames
    )
    heads = rank - 3 if attends else None  # the last two axes are queries and keys
    # Under vmap the shape is one example's, without its batch axis.
    batch = 0 if place.call is None else program.calls[place.call].batch_axis
    if rank > 1 and not place.result_batch_axes and heads != 0 and batch in site.shared_axes:
        yield "shared-over-batch", "all examples have the same mask."
    if heads in site.shared_axes:
        yield "shared-over-heads", "all heads have the same mask."


def _equal_keys(place: Place) -> bool:
    """Whether vmap maps over keys that are known to be all equal."""
    assert place.key is not None
    known = place.key.known
    return place.key_batch_axes > 0 and known is not None and rows_equal(known)


def _is_evaluation(function: str) -> bool:
    own = function.rpartition(".")[2]
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", own).lower()))
    return bool(words & _EVALUATION) and not words & _ON_PURPOSE
