"""Certificates: each rule of the verdict on cards written by hand, what is shown, and a real one"""
import json
import pickle
from dataclasses import replace

import pytest
import torch

from transporter_nb.concepts.directions import TargetCaption, VelocitySlider
from transporter_nb.explain import certificate
from transporter_nb.explain.answer_table import Answers
from transporter_nb.explain.card import Certificate, Exchange, ClipReport
from transporter_nb.explain.certificate import RandomLike, certify, vlm_reader
from transporter_nb.explain.explanation import Explanation
from transporter_nb.explain.transporter import Transporter
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.world.words import EXAMPLE, SLOTS, UNREADABLE, caption

RED = caption(EXAMPLE)
BASE = {"pair": parse_contrast("red -> blue"), "asked": ["colour"], "targets": {"colour": "blue"}}
TWO = {
    "pair": parse_contrast("red+slowly -> blue+quickly"), "asked": ["colour", "pace"],
    "targets": {"colour": "blue", "pace": "quickly"},
}


def seen(*p, phi=None, distance=0.0, **words):
    return ClipReport(list(phi or p), list(p), [0.0] * len(p), {**EXAMPLE.words, **words}, distance)


def alone(slot, after, *response, clean=3):
    return Exchange(
        slot, getattr(EXAMPLE, slot), after, f"... {after} ...", clean, 3,
        [0.01 + r for r in response], list(response), [9 * r for r in response],
    )


def card(unsteered, steered, exchanges=(), random=(), seeds=(), **facts):
    n = len(unsteered.reencoded)
    facts = {
        **dict(caption=RED, strengths=[1.0], seed=0, reader="pixels", **(BASE if n == 1 else TWO)),
        **facts,
    }
    return Certificate(
        unsteered=unsteered, steered=steered, random=list(random), seeds=list(seeds),
        exchanges={each.attribute: each for each in exchanges}, **facts,
    )


def rules(made): return [finding.rule for finding in made.findings()]


NO, YES = seen(0.01), seen(0.97, colour="blue")
ASKED = alone("colour", "blue", 0.98)
FLOOR = seen(0.97, colour="blue", floor="leafy")


@pytest.mark.parametrize(
    "made, expected",
    [
        (card(NO, YES, [ASKED]), "follows|as asked|nothing else"),
        (card(NO, seen(0.4, colour="blue"), [ASKED]), "follows in part|as asked|nothing else"),
        (
            card(NO, seen(0.05, colour="blue"), [alone("colour", "blue", 0.02)]),
            "does not follow|as asked|does not read it|nothing else",
        ),
        (card(NO, seen(0.05), [ASKED]), "does not follow|not changed|caption moves it"),
        (card(NO, seen(0.97), [ASKED]), "follows|not changed|adversarial"),
        (card(NO, seen(0.97, colour=UNREADABLE), [ASKED]), "follows|asked lost"),
        (card(NO, seen(0.97, colour="green"), [ASKED]), "follows|other word|nothing else"),
        (
            card(seen(0.98, colour="blue"), seen(0.99, colour="blue"), [ASKED]),
            "already|shown already",
        ),
        (
            card(NO, FLOOR, [ASKED, alone("floor", "leafy", 0.5)]),
            "follows|as asked|shared association",
        ),
        (card(NO, FLOOR, [ASKED, alone("floor", "leafy", 0.02)]), "follows|as asked|side effect"),
        (
            card(seen(0.4), FLOOR, [ASKED, alone("floor", "leafy", -0.3)]),
            "follows|as asked|against",
        ),
        (card(NO, FLOOR, [ASKED]), "follows|as asked|untested"),
        (card(NO, FLOOR, [ASKED, alone("floor", "leafy", clean=0)]), "follows|as asked|untested"),
        (
            card(
                NO, seen(0.97, floor="leafy"),
                [alone("colour", "blue", 0.0), alone("floor", "leafy", 0.9)],
            ),
            "follows|not changed|shared association|goes by",
        ),
        (
            card(NO, seen(0.97, colour="blue", shape=UNREADABLE, size=UNREADABLE), [ASKED]),
            "follows|as asked|lost",
        ),
        (
            card(NO, YES, [ASKED], random=[seen(0.9), seen(0.9), NO]),
            "follows|as asked|not specific|nothing else",
        ),
        (
            card(NO, YES, [ASKED], random=[seen(0.9), NO, NO]),
            "follows|as asked|not specific, at times|nothing else",
        ),
        (card(NO, YES, [ASKED], seeds=[seen(0.6)]), "follows|as asked|seed|nothing else"),
        (
            card(NO, seen(0.97, phi=[0.3], colour="blue"), [ASKED]),
            "follows|Phi disagrees|as asked|nothing else",
        ),
        (
            card(NO, NO, [ASKED], strengths=[0.0]),
            "does not follow|strength 0|not changed|caption moves it",
        ),
        (card(NO, seen(0.32), [ASKED], wanted=0.3), "follows|met|not changed|adversarial"),
        (
            card(NO, seen(0.6, colour="blue"), [ASKED], wanted=0.3),
            "follows|missed|as asked|nothing else",
        ),
    ],
)
def test_each_rule(made, expected):
    assert "|".join(rules(made)) == expected
    assert made.verdict == "; ".join(
        finding.text for finding in made.findings()
    ) and made.verdict in repr(made)


def test_several_words_are_judged_one_by_one():
    made = card(
        seen(0.01, 0.02), seen(0.98, 0.03, colour="blue"),
        [alone("colour", "blue", 0.97, 0.0), alone("pace", "quickly", 0.0, 0.01)],
    )
    assert rules(made) == [
        "follows", "does not follow", "as asked", "not changed", "does not read it", "nothing else",
    ]
    assert made.verdict.startswith(
        "the VLM follows (p(blue) .01 -> .98); the VLM does not follow (p(quickly) .02 -> .03)"
    )
    by_second = card(
        seen(0.01, 0.02), seen(0.98, 0.97, colour="blue", pace="quickly", floor="leafy"),
        [alone("floor", "leafy", 0.0, 0.6)],
    )
    assert "p(quickly) .01 -> .61" in by_second.verdict  # the word that responds is the one named
    mean = card(seen(0.0, 0.0), seen(0.8, 0.0), wanted=0.4)
    # a wanted answer is of the mean
    assert rules(mean)[:2] == ["follows", "met"] and "asked for" in mean.verdict


def test_what_random_vectors_and_seeds_change_too_is_said():
    leafy = seen(0.01, floor="leafy")
    made = card(
        NO, FLOOR, [ASKED, alone("floor", "leafy", 0.0)], random=[leafy, leafy, NO],
        seeds=[NO, leafy],
    )
    assert "side effect of the generator; so do a random vector and another seed" in made.verdict
    assert "so does" not in card(
        NO, FLOOR, [ASKED, alone("floor", "leafy", 0.0)], random=[leafy, NO, NO],
    ).verdict


def test_nothing_is_shown_unescaped():
    evil = "<img src=x onerror=alert(1)>"
    words = {**EXAMPLE.words, evil: "a"}
    made = card(
        NO._replace(words=words), YES._replace(words={**words, evil: "<b>"}), [ASKED],
        caption=f"a red {evil}", pair=parse_contrast(f"red -> {evil}"), reader=evil, distance=evil,
        random=[NO._replace(words=words)],
    )
    page = made._repr_html_()
    assert evil not in page and "<b>," not in page and page.count(
        "&lt;img src=x onerror=alert(1)&gt;"
    ) >= 5
    assert "<script" not in page and "http" not in page
    assert made.as_dict()["changed"][evil] == ["a", "<b>"] and json.loads(
        json.dumps(made.as_dict())
    ) == made.as_dict()


def test_an_explanation_without_its_transporter_says_so(tmp_path):
    said = Answers(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), ["a ball"])
    e = Explanation(
        "a red ball", "a blue ball", BASE["pair"], torch.ones(1, 1), torch.zeros(1, 2, 1, 2, 2),
        torch.rand(1, 5, 3, 16, 24), said, said, torch.zeros(1), {"seed": 0},
    )
    with pytest.raises(ValueError, match="Make it with Transporter.explain"): e.certificate
    assert not e.is_certified and "certificate" not in json.loads(
        e.save(tmp_path / "clip")[-1].read_text()
    )


@pytest.fixture(scope="module")
def l2v(): return Transporter.load("videollama3", device="cpu")


def test_a_shipped_concept(l2v, monkeypatch):
    e = l2v.explain(RED, change="red -> blue", strengths=[0.5, 1.0], seed=1, progress=False)
    asked = []
    monkeypatch.setattr(
        certificate, "sample_clips",
        lambda *args, made=certificate.sample_clips: asked.append(args[1]) or made(*args),
    )
    made = e.certificate
    assert rules(made) == ["follows", "as asked", "nothing else"]
    assert made.exchanges["colour"].clean == 4
    torch.testing.assert_close(
        torch.tensor([made.steered.reencoded, made.steered.phi]),
        torch.stack([e.reencoded.target[-1], e.phi.target[-1]]), atol=1e-3, rtol=0,
    )
    assert made.steered.distance == pytest.approx(
        e.distance[-1].item(), abs=1e-3,
    ) and e.certificate is made and len(asked) == 1
    # another explanation, by its settings
    again = replace(e, settings={**e.settings, "start_step": 11})
    assert (
        not again.is_certified and again.certificate.steered.distance < 0.5 * made.steered.distance
    )
    other = certify(
        l2v.models, RED, l2v.bank["red -> blue"], seed=1, n_random=1,
        n_seeds=0,
    )
    # seeded, whatever else is made
    assert other.random[0].words == made.random[0].words
    assert other.random[0].distance == pytest.approx(made.random[0].distance, abs=1e-3)


def test_where_pixels_cannot_be_read_the_vlm_is_asked(l2v, monkeypatch):
    monkeypatch.setattr(certificate, "pixel_reader", lambda pair, text: None)
    made = certify(
        l2v.models, RED,
        TargetCaption(parse_contrast("red+stone -> blue+leafy")), seed=1, n_random=1, n_seeds=1,
    )
    assert "VLM's own answers" in made.reader and "VLM's own answers" in repr(made)
    assert made.asked == ["red", "stone"] and not made.targets and not {"red", "stone"} & set(
        made.unsteered.words
    ) and "large" in made.kept
    assert rules(made) == ["follows", "not judged"]
    assert made.exchanges["stone"].response[1] > 0.9 > made.exchanges["red"].response[1]


def test_words_that_the_vlm_has_no_token_for_cannot_be_read(l2v):
    clip = torch.rand(1, 9, 3, 32, 32)
    found = vlm_reader(
        l2v.vlm, parse_contrast("red -> blue"), "one small red dog slides left",
    ).read(clip, l2v.vlm.embed(clip))[0]
    assert list(found) == ["one", "small", "dog", "slides", "left"] and [
        found[word] for word in ("dog", "slides", "left")
    ] == [UNREADABLE] * 3


def test_random_controls_are_as_long_as_what_they_control(l2v):
    concept = l2v.bank["two -> one"]
    text = "two small red rings bounce right quickly over a sandy floor"
    for direction in (concept, TargetCaption(concept.pair), VelocitySlider(concept.pair)):
        own = direction.offset(l2v.generator, text) if hasattr(
            direction, "offset",
        ) else TargetCaption(concept.pair).offset(l2v.generator, text)
        other = RandomLike(direction, 5).offset(l2v.generator, text)
        torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), atol=1e-4, rtol=1e-4)
        assert other.isfinite().all() and torch.cosine_similarity(
            other.flatten(), own.flatten(), dim=0,
        ).abs() < 0.5
    both = certify(
        l2v.models, text,
        [concept, VelocitySlider(parse_contrast("small -> large"))], [1.0, 1.0], seed=2, n_random=1,
        n_seeds=0,
    )
    assert both.pair.name == "two+small -> one+large" and len(both.steered.reencoded) == 2 and set(
        both.unsteered.words
    ) == set(SLOTS)


def test_an_answer_asked_through_phi_is_judged_through_phi():
    facts = dict(wanted=0.5, exchanges=[ASKED])
    by_phi, by_clip = (
        card(NO, seen(0.98, phi=[0.4986], colour="blue"), through=way, **facts)
        for way in ("phi", "reencoded")
    )
    assert rules(by_phi) == [
        "follows", "met", "clip itself", "Phi disagrees", "as asked", "nothing else",
    ] and rules(by_clip)[:3] == ["follows", "missed", "Phi disagrees"]
    assert by_phi.verdict.startswith(
        "through Phi the VLM follows (p(blue) .01 -> .50); .50 was asked for and met; to the clip "
        "itself it says p(blue) .01 -> .98"
    )
    assert by_phi.as_dict()["through"] == "phi" and "which the verdict goes by" in repr(
        by_phi
    ) and "which the verdict goes by" not in repr(by_clip)
    two = card(seen(0.0, 0.0), seen(0.0, 0.0, phi=[0.8, 0.0]), wanted=0.4, through="phi")
    assert "met" in rules(
        two
    ) and "to the clip itself it says p(blue) 0 -> 0; p(quickly) 0 -> 0" in two.verdict


def test_a_random_vector_that_moves_phi_alone_is_said():
    moved, still = seen(0.0, phi=[1.0]), seen(0.0)
    once = card(NO, YES, [ASKED], random=[moved, still, still])
    assert rules(once) == ["follows", "as asked", "Phi not specific, at times", "nothing else"]
    assert (
        "through Phi 1 of 3 random vectors moves the answer too (p(blue) .01 -> 1, and 0 when its "
        "clip is seen)" in once.verdict
    )
    # also where nothing follows
    assert "Phi not specific" in rules(card(NO, NO, [ASKED], random=[moved, moved, still]))
    # its clip says so as well: 'not specific'
    assert "Phi not specific, at times" not in rules(
        card(NO, YES, [ASKED], random=[seen(1.0), still, still])
    )


def test_a_pickle_holds_no_models(l2v):
    e = l2v.explain(RED, change="red -> blue", strengths=[1.0], seed=1, progress=False)
    data = pickle.dumps(e)
    again = pickle.loads(data)
    assert len(data) < 2e6 and again.made_by is None and e.made_by is not None and torch.equal(
        again.videos, e.videos,
    ) and again.settings == e.settings
    with pytest.raises(ValueError, match="Make it with Transporter.explain"): again.certificate
