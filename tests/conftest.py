"""Shapes are checked at run time in every test: the annotations of the package are its contract.
Warnings are errors."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
from jaxtyping import install_import_hook

install_import_hook("transporter_nb", "beartype.beartype")  # before the first import of the package


# Files that take above half a minute, and folders, the longest first: what is long and comes last
# leaves one of two workers without work
LONG = (
    "rehearsal", "test_widgets", "test_explorer", "test_leaving", "test_results", "test_tables",
    "test_jupyterlab", "test_shaping", "test_captions", "test_comparison", "test_server",
    "test_train_paper", "test_smollm2", "test_triton", "test_memory", "test_papermill",
)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # libraries speaking to each other
    for line in (
        "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning", "ignore::FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


def place(item):
    "Where a test's file, or its folder, stands in `LONG`"
    names = item.path.stem, item.path.parent.name
    return min((LONG.index(name) for name in names if name in LONG), default=len(LONG))


def pytest_collection_modifyitems(items): items.sort(key=place)


@pytest.fixture
def root():
    from transporter_nb.core.base import repo_path
    return repo_path()
