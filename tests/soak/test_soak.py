"""The short form of the soak: real processes, killed a few times each."""

import os
import subprocess
import sys

import pytest

from tests.documents import ROOT
from tests.soak.jobs import JOBS, same


def test_what_is_killed_goes_on_to_the_same_result(tmp_path):
    kills = str(2 * len(JOBS))
    words = ["--kills", kills, "--seed", "7", "--what", ",".join(JOBS)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [*JOBS]
    assert all(": 2 kills in " in line and "every result equal to the bit" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_what_is_unknown_is_refused():
    words = [sys.executable, "-m", "tests.soak", "--what", "everything"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "{'everything'} is not among fit, calibration, compare, conversion, export, malformed" in done.stderr


@pytest.mark.parametrize(("one", "other"), [([1.0], [1.0 + 1e-16 * 3]), ({"a": 1}, {"a": True}), ((1,), [1])])
def test_results_that_differ_are_told_apart(one, other):
    assert same(one, one)
    assert not same(one, other)
