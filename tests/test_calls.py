"""Random calls of the whole public API: an error of our own, or a right result; see calls.py."""

import collections

import calls
import pytest
import test_api

CALLS, PARTS = 2000, 4


def test_every_public_callable_has_a_base_call():
    lines = test_api.SNAPSHOT.read_text().splitlines()
    public = {line.partition("(")[0] for line in lines if ": " not in line.partition("(")[0]}
    assert public == calls.known()


@pytest.mark.parametrize("part", range(PARTS))
def test_bad_arguments_are_named_and_good_ones_work(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some calls write files
    results = list(calls.run(range(part, CALLS, PARTS), seed=0, quick=True))
    faults = [f"{x.text}\n    # {x.verdict.reason}" for x in results if x.verdict.kind == "fault"]
    assert not faults, "\n".join([calls.PREAMBLE, *faults])
    counts = collections.Counter(result.verdict.kind for result in results)
    assert counts["error"] > len(results) / 2
    assert counts["result"] > len(results) / 50
