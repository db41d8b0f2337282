"""The short form of the soak: each job is killed a few times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.soak
def test_what_is_killed_goes_on_to_the_same_result(tmp_path):
    words = [sys.executable, "-m", "tests.soak", "--kills", "3", "--examples", "0", "--seed", "7"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 3 kills in ") == 5
    assert list(tmp_path.iterdir()) == []
