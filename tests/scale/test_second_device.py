"""Without a GPU, its tests on a device that stands in for one."""

import os
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.documents import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a later version of torch",
)
def test_the_tests_of_a_gpu_pass():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.second_device", "tests/scale/test_gpu.py"]
    command += ["-k", "not perturbed and not straight"]  # these estimators make the same calls as the others
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
