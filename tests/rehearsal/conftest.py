"""One hub cache with every release, for the whole session; results stay in a folder of the test"""
import matplotlib

matplotlib.use("Agg")

import pytest
from huggingface_hub import constants

import releases
from transporter_nb.concepts import learning
from transporter_nb.evaluate import results


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory):
    """Every release under its real repository and revision, in a hub cache of the session"""
    cache = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield releases.publish(cache, tmp_path_factory.mktemp("aside"))


@pytest.fixture
def decided(monkeypatch):
    """VLMs with random weights answer nearly alike to some pairs, which learning refuses"""
    monkeypatch.setattr(learning, "check_divergence", lambda found, pair, vlm: max(found, .01))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where rows of tables are kept: a table finds the rows of the one before"""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory, and a repository that holds no results"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repository").mkdir()
    monkeypatch.setattr(
        results, "repo_path", lambda *parts: tmp_path.joinpath("repository", *parts))
    return tmp_path
