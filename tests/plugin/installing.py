"""pip, as a stranger uses it, but offline and into a folder of the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def pip_install(*packages: Path, site: Path, work: Path) -> None:
    """Install source folders into `site`; they are copied to `work` first, since building leaves files in them."""
    copies = [shutil.copytree(package, work / package.name) for package in packages]
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", site]
    command = [sys.executable, "-m", "pip", "install", *flags, *copies]
    plain = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
