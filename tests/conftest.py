"""Shapes are checked at run time in every test: the annotations of the package are its contract. Warnings are errors."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
from jaxtyping import install_import_hook

install_import_hook("transporter_nb", "beartype.beartype")  # before the first import of the package


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for line in ("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning", "ignore::FutureWarning"):  # libraries speaking to each other
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def root():
    from transporter_nb.core.base import repo_path
    return repo_path()
