"""Writes recordings to files that any machine can read: compressed JSON, without times."""

import base64
import contextlib
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jdropout._values import type_name
from jdropout.testing._program import Aval, Block, Equation, Program
from jdropout.testing._sources import Source

_FORMAT = "jdropout recording"
_VERSION = 1


def write(path: str | os.PathLike[str], program: Program, rows: np.ndarray, about: Any) -> None:
    contents = {
        "format": _FORMAT,
        "version": _VERSION,
        "about": about,
        "arguments": program.arguments,
        "constants": program.constants,
        "equations": _written(program.block),
        "shape": rows.shape,
        "fingerprints": base64.b64encode(rows.astype("<u8").tobytes()).decode(),
    }
    text = json.dumps(contents, separators=(",", ":"))
    partial = f"{os.fspath(_checked(path))}.tmp"
    try:
        with open(partial, "wb") as file:
            file.write(gzip.compress(text.encode(), mtime=0))
        os.replace(partial, path)  # what fails before leaves an earlier recording as it is
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def read(path: str | os.PathLike[str]) -> tuple[Program, np.ndarray, Any]:
    try:
        with open(_checked(path), "rb") as file:
            contents = json.loads(gzip.decompress(file.read()))
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise _not_a_recording(path) from error
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
        raise _not_a_recording(path)
    if contents["version"] != _VERSION:
        raise ValueError(
            f"path holds a recording of version {contents['version']}, and this jdropout reads "
            f"version {_VERSION}: {os.fspath(path)!r}. Record again, or install the jdropout that "
            "wrote it."
        )
    program = Program(
        tuple((name, _aval(aval)) for name, aval in contents["arguments"]),
        tuple(map(_aval, contents["constants"])),
        _read(contents["equations"], itertools.count()),
    )
    rows = np.frombuffer(base64.b64decode(contents["fingerprints"]), "<u8").astype(np.uint64)
    return program, rows.reshape(contents["shape"]), contents["about"]


def _checked(path: Any) -> str | os.PathLike[str]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be a string or a path, got {path!r} of type {type_name(path)}. Pass the "
            "name of a file."
        )
    return path


def _not_a_recording(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"path must be a file that Recording.save wrote, got {os.fspath(path)!r}, which is not one "
        "or is damaged. Save the recording again."
    )


def _written(block: Block) -> list[Any]:
    return [
        [
            equation.primitive,
            equation.outputs,
            equation.operands,
            equation.params,
            equation.source,
            equation.kind,
            list(map(_written, equation.bodies)),
            equation.length,
            equation.axes,
        ]
        for equation in block.equations
    ]


def _read(equations: list[Any], numbers: Iterator[int]) -> Block:
    read = []
    for primitive, outputs, operands, params, source, kind, bodies, length, axes in equations:
        number = next(numbers)
        read.append(
            Equation(
                number,
                primitive,
                tuple(None if output is None else _aval(output) for output in outputs),
                tuple(operands),
                params,
                Source(*source),
                kind,
                tuple(_read(body, numbers) for body in bodies),
                length,
                tuple((name, size) for name, size in axes),
            )
        )
    return Block(tuple(read))


def _aval(written: Any) -> Aval:
    dtype, shape = written
    return Aval(dtype, tuple(shape))
