"""What an audit returns: sites, findings, and a table of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

FIXES = {
    "key-reused": "give every dropout a key of its own, such as "
    "jdropout.keys.site_key(root, step=step, site='name').",
    "same-mask": "make all keys in one way, such as jdropout.keys.site_key, which cannot meet "
    "others; fold_in(key, i) and split(key)[i] are the same key.",
    "key-independent-of-step": "derive the key from the step: "
    "jdropout.keys.site_key(root, step=step, site=...), or pass a new key in every call.",
    "key-independent-of-iteration": "put the loop's index into the key: "
    "jdropout.keys.site_key(..., site=('layer', i)), or microbatch=i.",
    "rate-zero": "set the rate that you want; to switch dropout off pass deterministic=True.",
    "rate-one": "set a rate below 1: it is the probability of dropping, not of keeping.",
    "on-in-evaluation": "pass deterministic=True, or model.eval(), in evaluation.",
    "shared-over-devices": "say which part of the whole array a device has, with start and "
    "global_shape, or fold jax.lax.axis_index(axis) into the key.",
    "shared-over-batch": "leave the batch out of broadcast_dims, or split the key over vmap; in "
    "attention broadcast_dropout=False, in drop_path mode='row'.",
    "shared-over-heads": "leave the heads out of dropout_broadcast_dims; in Flax's layers pass "
    "broadcast_dropout=False.",
}
"""What to do, for each code of a finding."""


@dataclasses.dataclass(frozen=True)
class AuditedSite:
    """A dropout in the audited function."""

    path: str
    """Of the Flax module it belongs to, such as ``MLP/dropout1``; else the function it is in."""
    location: str
    """File and line that call it."""
    kind: str
    """The function's name, ``mask`` for `keep_mask`, or ``bernoulli`` for other libraries."""
    shape: tuple[int, ...]
    """Of the array, or of the attention's probabilities; under ``vmap`` that of one example."""
    rate: float | None
    """None if it is traced."""
    effective_rate: float | None
    """The probability of dropping that it really has."""
    deterministic: bool | None
    """None if it is traced."""
    shared_axes: tuple[int, ...]
    """Axes along which all elements share their fate."""
    stored_bytes: int
    """What differentiation stores of it for the backward pass."""
    key: str
    """A name of the key: sites with one name have one key. Empty if no mask is drawn."""
    key_sources: tuple[str, ...]
    """The arguments that the key depends on."""
    loops: tuple[str, ...]
    """The loops it is in, outermost first."""
    functions: tuple[str, ...]
    """The functions that it is called under, innermost first."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong with one or more sites."""

    code: str
    sites: tuple[int, ...]
    """Their numbers in the report, from 0."""
    message: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `audit`; ``str`` of it is a table."""

    name: str
    """Of the audited function."""
    sites: tuple[AuditedSite, ...]
    findings: tuple[Finding, ...]

    def assert_clean(self, *, allow: Iterable[str] = ()) -> None:
        """Raises an `AssertionError` with the whole table if anything was found.

        Args:
          allow: codes of findings that are meant to be.
        """
        if isinstance(allow, str):
            allow = (allow,)
        allow = tuple(allow)
        if not set(allow) <= set(FIXES):
            raise ValueError(f"allow must hold codes of findings, got {allow}: {sorted(FIXES)}.")
        if any(finding.code not in allow for finding in self.findings):
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, strings and numbers, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        count = f"{_count(self.sites, 'site')}, {_count(self.findings, 'finding')}"
        lines = [f"dropout in {self.name}: {count}"]
        if self.sites:
            lines += ["", *_table([_HEADINGS, *map(_row, itertools.count(), self.sites)])]
        for finding in self.findings:
            where = f"{'site' if len(finding.sites) == 1 else 'sites'} "
            where += ", ".join(map(str, finding.sites))
            lines += ["", f"{finding.code} ({where}): {finding.message}"]
            lines += [f"  fix: {finding.fix}"]
        return "\n".join(lines)


_HEADINGS = (
    "#",
    "path",
    "location",
    "kind",
    "shape",
    "rate",
    "shared axes",
    "stored",
    "key",
    "from",
)


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")


def _row(number: int, site: AuditedSite) -> tuple[str, ...]:
    if site.deterministic:
        rate = "off"
    elif site.rate is None or site.effective_rate is None:
        rate = "traced"
    else:
        exact = f"{site.effective_rate:.6g}"
        rate = exact if exact == f"{site.rate:g}" else f"{site.rate:g} ({exact})"
    shape = " ".join(["x".join(map(str, site.shape)) or "scalar", *(f"in {x}" for x in site.loops)])
    return (
        str(number),
        site.path,
        site.location,
        site.kind,
        shape,
        rate,
        ", ".join(map(str, site.shared_axes)) or "-",
        f"{site.stored_bytes} B",
        site.key or "-",
        ", ".join(site.key_sources) or "-",
    )


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
