"""MIMIC: what is asked, which tokens carry loss, which terms there are, and that an answer is reached"""
from dataclasses import replace

import pytest
import torch

from transporter_nb.evaluate.baselines.objectives import TargetToken, VisionReader
from transporter_nb.models.encoders.networks import load_encoder
from transporter_nb.evaluate.mimic import (MINI_TEMPLATES, PAPER_TEMPLATES, MimicConfig, TemplateAnswers, answer_turn, base_term, concept_clips, invert_answer, invert_mimic, judge_images, mimic_terms, named_words,
                                  stand_still, verifier_hits)
from transporter_nb.models.registry import load_vlm, shipped_vlm_names
from transporter_nb.world.words import SLOTS, render, sample_scenes


@pytest.fixture(scope="module")
def vlms():
    return {name: load_vlm(name) for name in shipped_vlm_names()}


@pytest.fixture(scope="module")
def vlm(vlms):
    return vlms["gemma3"]


def test_the_templates_of_the_miniatures_use_only_their_words(vlms):
    for model in vlms.values():
        for slot, words in SLOTS.items():
            for template in MINI_TEMPLATES:
                turn = answer_turn(model, template, words[0], words[1])
                assert model.tokenizer.unk_token_id not in model.prompt_ids(turn.question) + model.answer_ids(turn), (slot, template)
        for template in PAPER_TEMPLATES:
            with pytest.raises(ValueError, match=f"{template!r} cannot be put to {model.name}.*has no token for"):
                answer_turn(model, template, "blue", "red")


def test_only_the_tokens_of_the_answer_carry_loss(vlm):
    video = render(sample_scenes(1, seed=61_010))
    values, gradients = [], []
    for negative in ("one blue ball", "two large yellow cones"):  # another question of another length, the same answer
        objective = TemplateAnswers(vlm, ["two green rings"], [negative], ("choice",))
        asked, = objective.asked
        assert asked.targets[asked.targets >= 0].tolist() == vlm.word_ids("two green rings")
        said = asked.token_log_probs(video)
        assert (said != 0).sum() == 3
        torch.testing.assert_close(objective(video), -said.sum(1) / 3)
        moving = video.clone().requires_grad_()
        objective(moving).sum().backward()
        gradients.append(moving.grad), values.append(objective(video).item())
    assert values[0] != values[1] and not torch.allclose(*gradients)


def test_a_longer_answer_keeps_its_own_mean(vlm):
    video, answers = render(sample_scenes(2, seed=61_011)), ["red", "one large red ball slides left"]
    together = TemplateAnswers(vlm, answers)(video)
    for k, answer in enumerate(answers): torch.testing.assert_close(TemplateAnswers(vlm, [answer])(video[k:k + 1])[0], together[k], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_weight_is_a_term_and_no_weight_is_none(vlm, version):
    reader, video = VisionReader(vlm), stand_still(render(sample_scenes(2, seed=61_012)))
    config = (MimicConfig.v1() if version == "v1" else MimicConfig.v2()).mini()
    real, guide = [stand_still(concept_clips("red", n, n)) for n in (2, 3)], load_encoder("frames")
    answers = TemplateAnswers(reader, ["red", "red"])
    terms = mimic_terms(reader, answers, real, config, guide)
    fields = [name for name in ("sce", "base", "guide", "patch", "inside", "tv1", "tv2", "l2", "time") if getattr(config, name)]
    assert list(terms) == fields and ("guide" in terms) == (version == "v1") and ("inside" in terms) == (version == "v2")
    for name, term in terms.items():
        moving = video.clone().requires_grad_()
        value = term.fn(moving, 0)
        value[1].backward()
        assert term.weight == getattr(config, name) and value.shape == (2,) and value[1] > 0
        assert moving.grad[1].any() and not moving.grad[0].any(), name
        assert list(mimic_terms(reader, answers, real, replace(config, **{name: 0.}), guide)) == [other for other in fields if other != name]


def test_relative_statistics_do_not_depend_on_neighbours(vlm):
    reader, video = VisionReader(vlm), stand_still(render(sample_scenes(2, seed=61_013)))
    real = [concept_clips("snowy", 2, 1), concept_clips("leafy", 3, 2)]
    together = base_term(reader, real, True)(video)
    for k in range(2): torch.testing.assert_close(base_term(reader, real[k:k + 1], True)(video[k:k + 1])[0], together[k], rtol=1e-3, atol=1e-4)
    own = base_term(reader, [video[:1]], True)
    assert own(video[:1]) < 1e-3 < own(video[1:])


def test_twenty_steps_raise_the_probability_of_the_target(vlm):
    captions = ["one large red ball slides left slowly over a stone floor", "two small red rings bounce right quickly over a sandy floor"]
    found = invert_mimic(vlm, captions, "red -> blue", [61_014, 61_015], config=MimicConfig.v2().mini(steps=20), progress=False)
    start = torch.tensor(found.curves["probability"][0])
    assert (found.probability > start).all() and found.probability.mean() > start.mean() + .1
    torch.testing.assert_close(TargetToken(vlm, "red -> blue", captions).target_probability(found.videos), found.probability, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.videos[:, 0], found.videos[:, -1]) and 0 <= found.videos.min() and found.videos.max() <= 1


def test_the_guide_does_not_judge_and_exchanged_answers_lose(vlm):
    answers = ["two small green rings", "one large red ball", "one large blue cone"]
    clips = torch.cat([stand_still(concept_clips(answer, 1, 61_016)) for answer in answers])
    with pytest.raises(ValueError, match="cannot verify them"):
        verifier_hits(clips, answers, load_encoder("frames"))
    others = [stand_still(concept_clips(answer, 4, 61_017)) for answer in answers]
    right, wrong = judge_images(vlm, clips, answers, others), judge_images(vlm, clips.roll(1, 0), answers, others)
    for measure in ("p(answer)", "top-1", "CLIP-mini", "read"): assert sum(right[measure]) > sum(wrong[measure]), measure
    assert sum(right["LPIPS-mini"]) < sum(wrong["LPIPS-mini"])


def test_what_an_answer_names(vlm):
    for scene in sample_scenes(30, seed=61_018, split="all"): assert named_words(" ".join(scene.words.values())) == scene.words
    with pytest.raises(ValueError, match="must name something"): named_words("over a floor")
    with pytest.raises(ValueError, match="one seed and one set"): invert_answer(vlm, ["red", "blue"], seeds=[1])


def test_an_interrupted_run_goes_on_only_with_its_own_question(vlm, tmp_path):
    config, real = MimicConfig.v2().mini(steps=2), [concept_clips("red ball", n=2)]
    def ask(target, **other):
        return invert_answer(vlm, [target], config=other.get("config", config), seeds=[0], real_videos=other.get("real", real), progress=False, resume_path=tmp_path / "run.safetensors")
    first = ask("red ball")
    assert torch.equal(ask("red ball").videos, first.videos)
    for wrong in ({"target": "blue ball"}, {"target": "red ball", "real": [1 - real[0]]}, {"target": "red ball", "config": replace(config, templates=("ask",))}):
        with pytest.raises(ValueError, match="another question"): ask(**wrong)
