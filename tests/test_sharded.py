"""Runs the tests in `sharded`, in a process with eight CPU devices."""

import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "sharded"


def run(*paths):
    """Runs the tests of files; an error holds everything that pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    result = subprocess.run(
        command,
        cwd=FOLDER.parent.parent,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=600,
    )
    summary = result.stdout.rstrip().rpartition("\n")[2]
    # Skipped and deselected tests would be in the summary, too.
    if result.returncode != 0 or not re.fullmatch(r"\d+ passed in .*", summary):
        raise AssertionError(f"pytest ended with code {result.returncode}\n{result.stdout}")


def test_on_eight_devices():
    files = sorted(FOLDER.glob("test_*.py"))
    assert len(files) > 2
    run(*files)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def test(): assert 1 + 1 == 3", "assert 1 + 1 == 3"),
        ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip()", "1 passed, 1 skipped"),
        ("", "no tests ran"),
    ],
)
def test_a_file_that_fails_skips_or_has_no_tests_is_found_out(text, reason, tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(text)
    with pytest.raises(AssertionError, match=re.escape(reason)):
        run(path)
