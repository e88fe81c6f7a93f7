"""`from transporter_nb import Transporter` works, and costs nothing before a name is used"""
import importlib
import subprocess
import sys

import pytest

import transporter_nb


@pytest.mark.parametrize("name", transporter_nb.HOMES)
def test_a_name_of_the_package_is_the_one_of_its_module(name):
    thing = getattr(transporter_nb, name)
    home = importlib.import_module(f"transporter_nb.{transporter_nb.HOMES[name]}")
    assert getattr(home, name) is thing and thing.__module__.startswith("transporter_nb.")
    assert name in dir(transporter_nb)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'Transport'.*Transporter, load_gen"):
        transporter_nb.Transport


def test_importing_the_package_loads_no_library():
    asked = "import sys, transporter_nb; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert said.stdout.strip() == "set()", said.stdout + said.stderr
