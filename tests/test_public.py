"""The public surface: cheap to import, and nothing promised that is not there."""

import subprocess
import sys

import pytest

import latentsmith


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, latentsmith; latentsmith.load_config('sd1'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", latentsmith.__all__)
def test_every_public_name_is_there(name):
    assert callable(getattr(latentsmith, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latentsmith.nothing
    assert "Pipeline" in dir(latentsmith)
