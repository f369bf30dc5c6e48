"""Turns the places of a traced program into the sites that an audit reports."""

import os
import re

from jdropout import _record
from jdropout._audit.program import Program
from jdropout._audit.report import AuditedSite
from jdropout._audit.values import Place


def describe(program: Program) -> tuple[AuditedSite, ...]:
    """Describes the places of a program, in program order."""
    numbers = dict.fromkeys(place.key.number for place in program.places if place.key)
    keys = {number: f"k{i + 1}" for i, number in enumerate(numbers)}
    return tuple(_describe(place, program, keys) for place in program.places)


def _describe(place: Place, program: Program, keys: dict[int, str]) -> AuditedSite:
    call = _as_call(place) if place.call is None else program.calls[place.call]
    # A cached jitted function has the frames of its first call, so add those of this call.
    own = [
        frame._replace(function=frame.function.rpartition("<locals>.")[-1])
        for frame in call.frames + place.frames
        if not _record.is_library(frame.file)
    ] or [_record.Frame("", 0, "")]
    return AuditedSite(
        path=call.path or own[0].function,
        location=f"{os.path.basename(own[0].file)}:{own[0].line}",
        kind=call.kind,
        shape=call.shape,
        rate=call.rate,
        effective_rate=call.effective_rate,
        deterministic=call.deterministic,
        shared_axes=call.shared_axes,
        stored_bytes=call.stored_bytes,
        saved_work=call.saved_work,
        key="" if place.key is None else keys[place.key.number],
        key_sources=()
        if place.key is None
        else tuple(name for i, name in enumerate(program.names) if i in place.key.sources),
        loops=tuple(loop.describe() for loop in place.loops),
        functions=tuple(dict.fromkeys(frame.function for frame in own)),
    )


def _as_call(place: Place) -> _record.Call:
    """Describes another library's Bernoulli mask as if it were a call of this one."""
    # The scope has the names of linen's modules, wrapped as in jit(...) by transformations.
    path = re.sub(r"\w+\(|\)", "", place.scope).strip("/")
    return _record.Call(
        kind="bernoulli",
        path=path,
        frames=place.frames,
        shape=place.shape,
        rate=place.rate,
        effective_rate=place.rate,
        deterministic=False,
        shared_axes=place.shared_axes,
        batch_axis=0,
        located=False,
        stored_bytes=place.stored_bytes,
        saved_work=0.0,
    )
