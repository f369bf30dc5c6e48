"""What an audit returns: sites, findings, and a table of them."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FIXES = {
    "key-reused": "give every dropout a key of its own, such as "
    "jdropout.keys.site_key(root, step=step, site='name').",
    "same-mask": "make all keys in one way, such as jdropout.keys.site_key, whose keys differ from "
    "all others; fold_in(key, i) and split(key)[i] are the same key.",
    "key-independent-of-step": "derive the key from the step: "
    "jdropout.keys.site_key(root, step=step, site=...), or pass a new key in every call.",
    "key-independent-of-iteration": "put the loop's index into the key: "
    "jdropout.keys.site_key(..., site=('layer', i)), or microbatch=i.",
    "rate-zero": "set the rate that you want; to switch dropout off pass deterministic=True.",
    "rate-one": "set a rate below 1: it is the probability of dropping, not of keeping.",
    "off-while-others-are-on": "pass the flag on to every layer inside, or leave the site out of "
    "the model if it is never to drop.",
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
    """A dropout site in the audited function.

    Attributes:
      path: path of the Flax module it belongs to, such as ``MLP/dropout1``; otherwise the
        function that contains it.
      location: file and line of the call.
      kind: name of the function; ``mask`` for `keep_mask`, ``bernoulli`` for other libraries.
      shape: shape of the array, or of the attention probabilities; under ``vmap``, of one
        example.
      rate: rate as passed; None if it is traced or there is none.
      effective_rate: drop probability that the site really has; None if it is traced or there
        is none.
      deterministic: the flag; None if it is traced.
      shared_axes: axes along which the mask is shared.
      stored_bytes: number of bytes that differentiation stores for the backward pass.
      saved_work: fraction of the work behind the site that is skipped: 0 where everything is
        computed before some of it is dropped, the expectation for `layer_drop`, and None if the
        rate is traced.
      key: name of the key; sites with the same name use the same key. Empty if no mask is
        drawn.
      key_sources: arguments that the key depends on.
      loops: loops that contain the site, outermost first.
      functions: functions that the site is called under, innermost first.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def loss(key, x):
      ...     return jdropout.dropout(key, x, 0.1).sum()
      >>> (site,) = jdropout.audit(loss, jax.random.key(0), jnp.ones((8, 16))).sites
      >>> site.kind, site.shape, site.rate, site.stored_bytes
      ('dropout', (8, 16), 0.1, 8)

    References:
      The page "Audit" of the documentation.
    """

    path: str
    location: str
    kind: str
    shape: tuple[int, ...]
    rate: float | None
    effective_rate: float | None
    deterministic: bool | None
    shared_axes: tuple[int, ...]
    stored_bytes: int
    saved_work: float | None
    key: str
    key_sources: tuple[str, ...]
    loops: tuple[str, ...]
    functions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AuditFinding:
    """A problem with one or more dropout sites.

    Attributes:
      code: kind of problem, such as ``key-reused``; `audit` lists all of them.
      sites: numbers of the sites in the report, from 0.
      message: description of the problem.
      fix: advice on how to solve it.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def loss(key, x):
      ...     return jdropout.dropout(key, x, 0.0).sum()
      >>> (finding,) = jdropout.audit(loss, jax.random.key(0), jnp.ones((8, 16))).findings
      >>> finding.code, finding.sites
      ('rate-zero', (0,))

    References:
      The page "Audit" of the documentation.
    """

    code: str
    sites: tuple[int, ...]
    message: str
    fix: str


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """Sites and findings of an `audit`; ``str(report)`` is a table.

    Attributes:
      name: name of the audited function.
      sites: dropout sites, in the order in which they are numbered, as `AuditedSite`.
      findings: problems that were found, as `AuditFinding`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def loss(key, x):
      ...     return jdropout.dropout(key, x, 0.1).sum()
      >>> report = jdropout.audit(loss, jax.random.key(0), jnp.ones((8, 16)))
      >>> report.assert_clean()
      >>> sorted(report.to_dict())
      ['findings', 'name', 'sites']

    References:
      The page "Audit" of the documentation.
    """

    name: str
    sites: tuple[AuditedSite, ...]
    findings: tuple[AuditFinding, ...]

    def assert_clean(self, *, allow: Iterable[str] | Mapping[str, str] = ()) -> None:
        """Raises an `AssertionError` with the whole table if the audit found anything.

        Args:
          allow: codes of findings to accept, such as ``['shared-over-batch']``, or a mapping from
            codes to the paths of the sites where they are accepted, which may have wildcards:
            ``{'rate-zero': 'Encoder/*'}`` for a library whose own default is 0.

        Raises:
          AssertionError: if there is a finding that is not accepted.
          ValueError: if `allow` holds something that is not a code of a finding.
        """
        paths = allowed(allow, FIXES)
        for finding in self.findings:
            accepted = paths.get(finding.code)
            sites = [self.sites[number].path for number in finding.sites]
            if accepted is None or not all(fnmatch.fnmatchcase(site, accepted) for site in sites):
                raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as dictionaries, sequences, strings and numbers, ready for JSON."""
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


def allowed(allow: Any, codes: Mapping[str, str]) -> dict[str, str]:
    """Returns the patterns of places where findings are allowed, by their codes."""
    names = names_of("allow", allow)
    patterns = dict(allow) if isinstance(allow, Mapping) else dict.fromkeys(names, "*")
    wrong = [p for p in patterns.values() if not isinstance(p, str)]
    if wrong or not set(names) <= set(codes):
        raise ValueError(
            f"allow must hold codes of findings, got {wrong or names}: {sorted(codes)}. Map a code "
            "to a pattern of places, or list codes."
        )
    return patterns


def names_of(argument: str, names: Any) -> tuple[str, ...]:
    """Returns one or several strings as a tuple."""
    names = (names,) if isinstance(names, str) else names
    try:
        found = tuple(names)
    except TypeError:
        found = (None,)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{argument} must hold strings, got {names!r}. Write ('name',) for one.")
    return found


_HEADINGS = (
    "#",
    "path",
    "location",
    "kind",
    "shape",
    "rate",
    "shared axes",
    "stored",
    "saves",
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
        _saving(site.saved_work),
        site.key or "-",
        ", ".join(site.key_sources) or "-",
    )


def _saving(work: float | None) -> str:
    if work is None:
        return "traced"
    return f"{work:.0%}" if work else "-"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
