"""Batches by the loader of torch: the same sequence for any number of workers, from any step; and
tar shards that WebDataset reads"""
import random

import pytest
import webdataset
from torch.utils.data import DataLoader

from transporter_nb.datasets.order import SampleOrder
from transporter_nb.datasets.streaming import ShardedSamples, StreamedBatches, write_shards

# more workers than cores are no fault here
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
ORDER, STOP = SampleOrder(n=23, batch_size=6, seed=2), 12


class Numbers:
    def __len__(self): return ORDER.n
    def __getitem__(self, index): return index


def sequence(workers, start=0, stop=STOP, rank=0, ranks=1):
    stream = StreamedBatches(Numbers(), ORDER, start, stop, rank, ranks)
    return list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=list))


@pytest.fixture(scope="module")
def whole(): return [ORDER.batch(number) for number in range(STOP)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_any_number_of_workers_gives_the_same_sequence(workers, whole):
    assert sequence(workers) == whole


@pytest.mark.parametrize("before, after", [(1, 4), (2, 3), (4, 2), (3, 0)])
def test_the_number_of_workers_may_change_in_the_middle(before, after, whole):
    step = random.Random(before).randrange(1, STOP)
    assert sequence(before, 0, step) + sequence(after, step) == whole


def test_ranks_together_train_on_the_batches_of_one_process(whole):
    parts = [sequence(2, rank=rank, ranks=3) for rank in range(3)]
    assert [sum(batch, []) for batch in zip(*parts)] == whole


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning",
                            "ignore::ResourceWarning")  # it leaves shards open
def test_webdataset_reads_our_shards(tmp_path):
    made = [{"__key__": f"{k:03d}", "txt": f"caption {k}".encode(), "x.raw": bytes([k]) * 700}
            for k in range(7)]
    assert write_shards(made, tmp_path, per_shard=4) == 7
    urls = [str(tmp_path / f"{k:06d}.tar") for k in range(2)]
    theirs = [{key: value for key, value in sample.items() if key in made[0]}
              for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert theirs == made == list(ShardedSamples(tmp_path))


def test_a_pickle_in_a_shard_is_refused_by_name_and_by_content(tmp_path):
    for ending, content in (("pkl", b""), ("json", b"\x80\x04K\x01.")):
        with pytest.raises(ValueError, match="is a pickle"):
            write_shards([{"__key__": "a", ending: content}], tmp_path)
    assert not (tmp_path / "shards.json").exists()
