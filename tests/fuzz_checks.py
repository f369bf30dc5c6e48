"""Coverage-guided fuzzing of the checks of arguments, with Atheris: see CONTRIBUTING.md.

`python tests/fuzz_checks.py -max_total_time=1200` reads the bytes that libFuzzer mutates as calls:
each chooses a function of `calls.py`, arguments of it, and for each of them a value, either from
the pools or made of bytes (integers, floats, strings, tuples, arrays of any dtype and shape). The
verdict is the same as there. The first fault of every place is printed as a line of Python, and the
run goes on. Calls are traced by `jax.eval_shape`, so that nothing is compiled. The coverage that
guides is the library's.
"""

import collections
import sys

import atheris

with atheris.instrument_imports(include=["jdropout"], enable_loader_override=False):
    import calls

TARGETS = [
    target
    for target in calls.every_target()
    if not any(word in target.text({}) for word in calls.EAGER)
]
COUNTS: collections.Counter[str] = collections.Counter()
PLACES: set[str] = set()
DTYPES = [name for name in calls.DTYPES_OF_ARRAYS if "ml_dtypes" not in name]


def value(data: atheris.FuzzedDataProvider, name: str, annotation: object) -> str:
    """The source of a value."""
    kind = data.ConsumeIntInRange(0, 9)
    if kind < 4:
        words = calls.fitting(name, annotation) if kind < 3 else list(calls.VALUES)
        return data.PickValueInList(calls.VALUES[data.PickValueInList(words)])
    return made(data, depth=0)


def made(data: atheris.FuzzedDataProvider, depth: int) -> str:
    kind = data.ConsumeIntInRange(0, 6)
    if kind == 0:
        return repr(data.ConsumeInt(data.ConsumeIntInRange(1, 9)))
    if kind == 1:
        return f"float({str(data.ConsumeFloat())!r})"
    if kind == 2:
        return f"float({str(data.ConsumeProbability())!r})"
    if kind == 3:
        return repr(data.ConsumeUnicodeNoSurrogates(4))
    if kind == 4:
        return data.PickValueInList(["None", "True", "False", "b''"])
    if kind == 5 or depth > 1:
        shape = tuple(data.ConsumeIntInRange(0, 6) for _ in range(data.ConsumeIntInRange(0, 4)))
        return f"np.ones({shape}, {data.PickValueInList(DTYPES)})"
    parts = [made(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))]
    return f"({''.join(part + ', ' for part in parts)})"


def one(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    target = provider.PickValueInList(TARGETS)
    parameters = {
        name: annotation
        for name, annotation in target.parameters().items()
        if calls.keyword(target, name)
    }
    changed = {}
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        name = provider.PickValueInList(list(parameters))
        changed[name] = value(provider, name, parameters[name])
    call = calls.Call(target, changed, "jax.eval_shape(lambda: {})")
    verdict = calls.judge(call)
    COUNTS[verdict.kind] += 1
    place = verdict.reason.rpartition("[")[2]
    if verdict.kind == "fault" and place not in PLACES:
        PLACES.add(place)
        print(f"{call.text}\n    # {verdict.reason}", file=sys.stderr, flush=True)
    if COUNTS.total() % 1000 == 0:
        print(f"# {COUNTS.total()} calls: {dict(COUNTS)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    atheris.Setup([*sys.argv, "-rss_limit_mb=8192", "-timeout=60"], one)
    atheris.Fuzz()
