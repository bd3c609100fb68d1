"""The same tests on a thousand files each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_thousand_files_of_each_class():
    tests = sorted(str(file) for file in Path(__file__).parent.glob("test_*.py") if file.name != "test_longer.py")
    environment = os.environ | {"LATENTSMITH_EXAMPLES": "1000"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
