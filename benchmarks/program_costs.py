"""Counts of a compiled program: launches, bytes and cycles, through its loops."""

import functools
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "c64": 64, "c128": 128}  # the other types say it in their name
_FREE = "parameter constant get-tuple-element tuple bitcast after-all partition-id opt-barrier"


class Costs(NamedTuple):
    """Counts of an instruction or a program."""

    launches: int = 0
    """Fusions, products, calls of libraries, copies and so on."""
    bytes: int = 0
    """Bytes that they read and write."""
    cycles: int = 0
    """Cycles that the TPU's compiler estimates."""

    def repeated(self, times: int) -> "Costs":
        """Returns the counts of a loop."""
        return Costs(*(times * count for count in self))

    def plus(self, other: "Costs") -> "Costs":
        """Returns the sums."""
        return Costs(*map(sum, zip(self, other, strict=True)))


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str
    """What is between the parentheses."""
    attributes: str

    def attribute(self, name: str) -> str:
        """Returns what is after the name, without braces; empty if it is not there."""
        found = re.search(rf"{name}=(?:%?([\w.-]+)|\{{([^}}]*)\}})", self.attributes)
        return (found[1] or found[2]) if found else ""


def costs(text: str) -> Costs:
    """Counts what a compiled program does; the body of a loop counts as often as it runs."""
    computations, entry = _parse(text)

    @functools.cache
    def of(name: str) -> Costs:
        total = Costs()
        for instruction in computations[name]:
            total = total.plus(of_instruction(name, instruction))
        return total

    def of_instruction(where: str, it: Instruction) -> Costs:
        if it.opcode == "while":
            condition = it.attribute("condition")
            trips = _trips(it, computations[condition])
            inside = of(it.attribute("body")).plus(of(condition))
            return inside.repeated(trips).plus(of(condition))
        if it.opcode == "conditional":
            names = it.attribute("branch_computations") or ", ".join(
                it.attribute(f"{which}_computation") for which in ("true", "false")
            )
            return max(of(name.strip(" %")) for name in names.split(","))
        if it.opcode == "call":
            return of(it.attribute("to_apply"))
        estimate = re.search(r'"estimated_cycles":"(\d+)"', it.attributes)
        cycles = int(estimate[1]) if estimate else 0
        if it.opcode in _FREE.split() or it.opcode.endswith("-done") or _allocates(it):
            return Costs(cycles=cycles)
        if it.opcode == "fusion":
            return Costs(1, _fusion_bytes(computations[it.attribute("calls")]), cycles)
        shapes = {other.name: other.shape for other in computations[where]}
        scalar = it.opcode != "custom-call" and "[]" in it.shape  # a TPU has a unit for them
        return Costs(
            0 if scalar else 1,
            _size(it.shape) + sum(_size(shapes[name]) for name in it.operands),
            cycles,
        )

    return of(entry)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        # A shape of several arrays is in parentheses, in which layouts may have some too.
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?[\])}]) ([\w-]+)\((.*)", line):
            inside, attributes = _until_closed(found[4])
            operands = re.findall(r"%([\w.-]+)", inside)
            computations[name].append(
                Instruction(found[1], found[2], found[3], operands, inside, attributes)
            )
    return computations, entry


def _until_closed(text: str) -> tuple[str, str]:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index], text[index:]
    return text, ""


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    # A scan compares its counter with a constant.
    (bound,) = (it.literal for it in condition if it.opcode == "constant" and "s32[]" in it.shape)
    return int(bound)


def _allocates(it: Instruction) -> bool:
    return it.opcode == "custom-call" and "AllocateBuffer" in it.attributes


def _size(shape: str) -> int:
    found = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    bits = sum(
        _BITS.get(name, int(width or 0)) * math.prod(int(n) for n in sizes.split(",") if n)
        for name, width, sizes in found
    )
    return bits // 8


def _fusion_bytes(body: list[Instruction]) -> int:
    """Bytes of a fusion's operands and results; of an array that it cuts or updates, that part."""
    by_name = {it.name: it for it in body}
    users: dict[str, list[Instruction]] = {it.name: [] for it in body}
    for it in body:
        for operand in it.operands:
            users[operand].append(it)

    def read(it: Instruction) -> int:
        parts = 0
        for user in users[it.name]:
            if user.opcode == "bitcast":
                parts += read(user)
            elif user.opcode in ("slice", "dynamic-slice"):
                parts += _size(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != it.name:
                return _size(it.shape)
        return min(parts, _size(it.shape))

    def written(it: Instruction) -> int:
        if it.opcode == "tuple":
            return sum(written(by_name[name]) for name in it.operands)
        if it.opcode == "bitcast":
            return written(by_name[it.operands[0]])
        updates = it.opcode == "dynamic-update-slice"
        return _size(by_name[it.operands[1]].shape if updates else it.shape)

    root = body[-1]
    return written(root) + sum(read(it) for it in body if it.opcode == "parameter")
