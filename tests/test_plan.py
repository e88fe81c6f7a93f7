"""What a figure will cost is predicted without numbers: the prediction must be what is measured, and refusals must say what to do."""
import pytest
import torch

from transporter_nb.core.hub import SOURCES, LoadOptions, require
from transporter_nb.explain.plan import Account, MetaRun, measured_workspace, plan, prepare, stage_calls, stage_cost

MINI = LoadOptions(dtype="float32")


@pytest.mark.parametrize("stage", ["velocity", "decode", "answer", "coupling", "concept"])
def test_predicted_memory_is_measured_memory(stage):
    torch.set_num_threads(1)
    cost, ready = stage_cost(stage, "videollama3", "mini", MINI, "cpu"), prepare(stage, "videollama3", "mini", "cpu", MINI)
    workspace, _ = measured_workspace(ready.call)
    assert abs(cost.workspace / workspace - 1) < .1, (cost.workspace, workspace)


def test_checkpointing_halves_what_a_concept_keeps():
    plain, saving = (stage_cost("concept", "phi4", "mini", LoadOptions(dtype="float32", checkpointing=on), "cuda") for on in (False, True))
    assert saving.workspace < plain.workspace / 2 and saving.weights == plain.weights


def test_an_account_forgets_what_is_gone():
    given = torch.ones(100)
    with Account([given]) as account:
        for _ in range(5): kept = given + 1
    assert account.live == 400 and account.peak == 800 and kept.sum() == 200


def test_questions_without_numbers():
    empty = torch.empty(3, device="meta")
    with Account(), MetaRun():
        assert bool(empty.isfinite().all()) and not bool((empty > 1).any())


def test_names_are_checked_before_anything_is_built():
    for wrong in ({"figure": "fig9"}, {"device": "H900"}, {"vlm": "phi9"}, {"scale": "huge"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))): plan(**wrong)


def test_absent_weights_name_the_command(tmp_path):
    for source in SOURCES.values():
        with pytest.raises(FileNotFoundError) as error: require(source, tmp_path)
        assert source.command in str(error.value) and "at 100 Mbit/s" in str(error.value) and (source.pinned or "is a branch" in str(error.value))


def test_a_figure_with_more_clips_costs_more():
    assert stage_calls("fig6", "mini")["clips"]["velocity"] > stage_calls("fig1", "mini")["clips"]["velocity"]
