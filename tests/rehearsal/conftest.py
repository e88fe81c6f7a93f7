"""One hub cache with every release, for the whole session"""
import matplotlib

matplotlib.use("Agg")

import pytest
from huggingface_hub import constants

import releases


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory):
    """Every release under its real repository and revision, in a hub cache of the session"""
    cache = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield releases.publish(cache, tmp_path_factory.mktemp("aside"))
