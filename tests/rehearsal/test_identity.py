"""The shipped miniature, written as a release and read by the loaders of releases, is the same"""
import pytest
import torch

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.core.base import checkpoint_path
from transporter_nb.core.hub import LoadOptions
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.registry import VLMS, load_generator, load_vlm, shipped_vlm_names
from transporter_nb.models.testing import LinearGenerator, export_snapshot, tiny_vlm
from transporter_nb.models.vlms.base import DESCRIBE
from transporter_nb.world.video import demo_video

EXACT = LoadOptions(dtype="float32")
CAPTION = "two small yellow rings slide right quickly over a stone floor"  # of figure 7
PARTS = {  # of figure 7
    "a: strengths": dict(strengths=[.4, 1.]),
    "b: a late start": dict(strengths=[1.], start_step=6),
    "c: a window of frames": dict(strengths=[1.], frame_window=(0, 5)),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The shipped miniature, and the same through the loaders of releases"""
    mini = Transporter.load("phi4", device="cpu")
    folder = tmp_path_factory.mktemp("exported")
    places = [str(export_snapshot(model, folder / name)) for name, model in (
        ("vlm", mini.vlm), ("generator", mini.generator))]
    with pytest.warns(UserWarning, match="no folder vision-lora"):
        exported = Transporter.load(*places, device="cpu", options=EXACT,
                                    coupling=checkpoint_path("coupling_phi4"))
    exported.bank = ConceptBank.from_pretrained(checkpoint_path("concepts_phi4"))
    return mini, exported


def test_it_went_through_the_loaders_of_releases(both):
    mini, exported = both
    assert exported.names["scale"] == "paper" and mini.names["scale"] == "mini"
    assert exported.generator.config.words == () and exported.coupling is not None
    for name in ("frames", "height", "width", "prompt_tokens", "steps", "guidance", "flow_shift",
                 "boundary_ratio", "vae", "transformer", "text"):
        assert getattr(exported.generator.config, name) == getattr(mini.generator.config, name)
    assert torch.equal(exported.vlm.preamble, mini.vlm.preamble)


@pytest.mark.parametrize("part", PARTS)
def test_figure_7_is_the_same(both, part):
    change = "slides -> bounces" if part[0] == "c" else "two+small -> one+large"
    one, other = (l2v.explain(CAPTION, change, seed=0, progress=False, **PARTS[part])
                  for l2v in both)
    assert (one.videos - other.videos).abs().max() < 1e-5
    for way in ("phi", "reencoded"):
        said, same = getattr(one, way), getattr(other, way)
        for answers in ("source", "target", "divergence"):
            assert (getattr(said, answers) - getattr(same, answers)).abs().max() < 1e-5
        assert said.captions == same.captions
    assert one.distance[-1] > .01  # the change is one


@pytest.mark.filterwarnings("ignore:this Phi-4 has no folder vision-lora")
@pytest.mark.parametrize("name", VLMS)
def test_every_vlm_answers_the_same(name, tmp_path):
    shipped = name in shipped_vlm_names()
    mini = load_vlm(name, device="cpu") if shipped else tiny_vlm(
        name, image_size=32, patch_size=8, hidden_size=32, vision_size=32)
    exported = load_vlm(str(export_snapshot(mini, tmp_path / name)), device="cpu", options=EXACT)
    clip = demo_video(9)
    tokens, same = (vlm.embed(clip) for vlm in (mini, exported))
    assert (tokens - same).abs().max() < 1e-4 * tokens.std()
    one, other = (vlm.next_token_log_probs(vlm.embed(clip), DESCRIBE) for vlm in (mini, exported))
    assert (one.exp() - other.exp()).abs().max() < 1e-5


def test_what_cannot_be_exported_is_refused(both, tmp_path):
    mini, exported = both
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="needs an empty folder"):
        export_snapshot(mini.vlm, tmp_path)
    with pytest.raises(ValueError, match="got LinearGenerator"):
        export_snapshot(LinearGenerator(), tmp_path / "linear")
    away = load_generator(exported.names["generator"], device="cpu",
                          options=LoadOptions(offload="layers"))
    with pytest.raises(ValueError, match="not in memory"): export_snapshot(away, tmp_path / "wan")
