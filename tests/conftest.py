"""Shapes are checked at run time in every test: the annotations of the package are its contract.
Warnings are errors."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
from jaxtyping import install_import_hook

install_import_hook("transporter_nb", "beartype.beartype")  # before the first import of the package


# Groups that take above half a minute, the longest first: what is long and comes last leaves one of
# two workers without work
LONG = (
    "rehearsal", "test_explorer", "test_widgets", "test_results", "leaving", "test_transport",
    "test_contract", "test_low_precision", "test_papermill", "triton", "jupyterlab", "test_docs",
    "test_train_paper", "test_smollm2", "test_server",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests of a group share a worker")
    config.addinivalue_line("filterwarnings", "error")
    # libraries speaking to each other
    for line in (
        "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning", "ignore::FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


def place(item):
    "Where a test's group, or its folder, stands in `LONG`"
    names = item.get_closest_marker("xdist_group").args[0], item.path.parent.name
    return min((LONG.index(name) for name in names if name in LONG), default=len(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file is a group, whose tests share models and servers; a mark makes a group of a part"
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=place)


@pytest.fixture
def root():
    from transporter_nb.core.base import repo_path
    return repo_path()
