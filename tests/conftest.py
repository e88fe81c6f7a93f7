"""Shapes are checked at run time in every test: the annotations of the package are its contract.
Warnings are errors."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
from jaxtyping import install_import_hook

install_import_hook("transporter_nb", "beartype.beartype")  # before the first import of the package


# Of the files that take above half a minute, the longest first: what is long and comes last leaves
# one of two workers without work
LONG = ()


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests of a group share a worker")
    config.addinivalue_line("filterwarnings", "error")
    # libraries speaking to each other
    for line in (
        "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning", "ignore::FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file is a group, whose tests share models and servers; a mark makes another group of a part"
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    place = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture
def root():
    from transporter_nb.core.base import repo_path
    return repo_path()
