"""What is shown in a notebook and in a terminal: every text as text, every picture inside the page
and described, nothing run and nothing fetched"""
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from transporter_nb.explain.card import Certificate, Exchange, ClipReport
from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.coupling.network import CouplingConfig, CouplingNetwork
from transporter_nb.coupling.training import TrainingResult
from transporter_nb.explain.answer_table import AnswerTable, Answers
from transporter_nb.explain.explanation import Explanation
from transporter_nb.explain.transporter import Transporter
from transporter_nb.core.pages import html_image, html_table
from transporter_nb.world.video import demo_video, show_gif

HOSTILE = [
    "<img src=x onerror=alert(1)>", "\"' onload='alert(1)' x=\"",
    "</style><script>alert(1)</script>", "a red 🎈 ball 👩‍🔬",
    "a $\\frac{1}{0$ ball", "&lt;b&gt;",
    "</div></table>", "x" * 10_000, "<svg/onload=alert(1)>",
    "javascript:alert(1) https://example.org/x.png",
]
TAGS = {"div", "b", "br", "small", "p", "span", "img", "table", "tr", "th", "td"}
SMALL = CouplingConfig.mini(
    latent_shape=(6, 3, 2, 4), text_dim=5, prompt_tokens=7, vlm_tokens=9, vlm_dim=8,
    projection_width=16, projection_depth=2, projection_hidden=12, structure_width=16,
    structure_depth=1, n_projections=10,
)


class Page(HTMLParser):
    """A page as a browser reads it: tags, attributes, text"""
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.attributes, self.text, self.open, self.images = [], "", [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, tag
        self.attributes += attributes
        if tag == "img": self.images.append(dict(attributes))
        if tag not in ("img", "br"): self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("img", "br"): self.open.pop()

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data
    def handle_comment(self, data): raise AssertionError(f"a comment: {data[:50]}")
    def handle_decl(self, decl): raise AssertionError(f"a declaration: {decl[:50]}")


def look(thing):
    """The page of a thing, held to the rules, and its text in a terminal"""
    shown, _ = DisplayFormatter().format(thing)
    assert set(shown) == {"text/html", "text/plain"}  # one picture of it, not two
    page = Page(shown["text/html"])
    # else MathJax sets what stands between dollars
    assert shown["text/html"].startswith('<div class="tex2jax_ignore mathjax_ignore"')
    for name, value in page.attributes:
        assert name in ("style", "alt", "src") or (name, value) == (
            "class", "tex2jax_ignore mathjax_ignore",
        ), name
        assert name != "style" or not re.search(r"url|expression|import|[<>&\"\\]", value), value
    for image in page.images:
        assert image["alt"].strip() and re.match(
            r"data:image/(png|gif);base64,[A-Za-z0-9+/=]+$", image["src"],
        )
    assert shown["text/plain"] == repr(thing)
    assert "<div" not in shown["text/plain"]
    assert "\x1b" not in shown["text/plain"]
    return page, shown["text/plain"]


def report(p, **words): return ClipReport([p], [p], [0.0], words, 0.1)


def explanation(
    caption="a red ball", target="blue", said="a blue ball", certified=True, **settings,
):
    pair, n = parse_contrast(f"red -> {target}"), 3
    answers = Answers(
        torch.tensor([[0.9], [0.5], [0.1]]), torch.tensor([[0.1], [0.5], [0.9]]),
        torch.tensor([0.0, 0.2, 0.8]), [said] * n,
    )
    e = Explanation(
        caption, caption.replace("red", target), pair, torch.tensor([[0.0], [0.5], [1.0]]),
        torch.zeros(n, 2, 1, 2, 2),
        torch.rand(n, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0)), answers, answers,
        torch.tensor([0.0, 0.1, 0.2]), {"seed": 7, **settings},
    )
    if certified:
        vars(e)["kept_certificate"] = Certificate(
            caption=caption, pair=pair, strengths=[1.0], seed=7, reader=said,
            unsteered=report(0.1, **{said: "red"}), steered=report(0.9, **{said: target}),
            random=[], seeds=[],
            exchanges={said: Exchange(said, "red", target, caption, 3, 3, [0.5], [0.5], [1.0])},
            asked=[said], targets={said: target}, videos=e.videos[:2],
        )
    return e


def concept(caption, **meta):
    return Concept(
        parse_contrast(f"red -> {caption.replace('->', '')}"), torch.ones(2, 3), ConceptConfig(),
        {
            "captions": [caption, "another"], "divergence": 0.7, "unexplained": 0.04,
            "kept": "learned", **meta,
        },
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_an_explanation_shows_hostile_texts_as_text(text):
    page, plain = look(explanation(f"a red {text}", text.replace("+", ""), text, seed=text))
    assert page.text.count(text) >= 5 and len(page.images) == 3  # clips, filmstrip, certificate
    assert repr(f"a red {text}") in plain


@pytest.mark.parametrize("text", HOSTILE)
def test_a_bank_shows_hostile_texts_as_text(text):
    page, plain = look(
        ConceptBank(
            [concept(text), concept("b" + text, kept=[text], divergence=text, captions=text)],
            generator=text,
        )
    )
    assert page.text.count(
        text
    ) == 4 and "not recorded" in page.text and "not measured" in page.text
    assert plain.startswith("ConceptBank of 2 concepts\n  Concept(") and len(
        plain.splitlines()
    ) == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_a_video_shows_hostile_captions_as_text(text):
    page, plain = look(show_gif(demo_video(), captions=[text, "second"]))
    assert text in page.text and text in page.images[0]["alt"] and plain.startswith(
        "2 clips side by side, 5 frames of 32 x 24 pixels, 0.833 s, looping"
    )
    rows, _ = look(AnswerTable([{text: text[:200], "p": 0.5}]))
    assert rows.text == text + "p" + text[:200] + "0.500"


def test_an_explanation_says_what_it_is_without_its_pictures():
    page, plain = look(explanation(certified=False))
    moving, strip = (image["alt"] for image in page.images)
    assert (
        "3 clips side by side, 5 frames of 24 x 16 pixels" in moving
        and "; strength 0.5; " in moving
    )
    assert (
        "red -> blue" in strip
        and "strength 1: p(blue) 0.90, through Phi 0.90, “a blue ball”" in strip
    )
    assert "strength 1 aims at: a blue ball; seed 7" in page.text and len(plain.splitlines()) == 5


def test_no_certificate_is_made_just_to_be_shown():
    asked = []
    class Asked:
        def __getattr__(self, name):
            asked.append(name)
            raise AttributeError(name)
    e = replace(explanation(certified=False), made_by=(Asked(), []))
    look(e)
    assert not asked and not e.is_certified
    assert len(look(explanation())[0].images) == 3  # where there is one it is shown


def test_control_characters_reach_neither_the_terminal_nor_the_table():
    table = AnswerTable([{"strength": "0", "caption": "a\x1b[31mred\nball\x00"}])
    assert repr(table).splitlines()[1] == "0         a [31mred ball"
    assert "\x1b" not in table._repr_html_()
    _, plain = look(explanation("a red \x1b[2J ball", said="one\ntwo"))
    assert len(plain.splitlines()) == 5
    look(ConceptBank([concept("\x1b[2J")]))


def test_an_empty_bank_says_so():
    page, plain = look(ConceptBank())
    assert plain == page.text == "ConceptBank, empty: learn a concept with bank.learn(...)"
    assert look(ConceptBank([concept("blue")]))[1].startswith("ConceptBank of 1 concept\n")


def test_a_bank_says_at_which_strength_a_concept_was_learned():
    drawn = concept("blue")
    fixed = replace(drawn, config=ConceptConfig(strengths="answer"))
    assert [ConceptBank([each]).rows()[0]["learned at strength"] for each in (drawn, fixed)] == [
        "all from 0 to 1", "0.70",
    ]


def test_a_coupling_reports_its_sizes_and_what_is_not_known():
    network = CouplingNetwork(SMALL)
    page, plain = look(network)
    assert (
        "latents 6 x 3 x 2 x 4" in plain and "10 learned projections" in plain and "\n" not in plain
        and len(plain) < 400
    )
    assert (
        f"{sum(weight.numel() for weight in network.parameters()):,} parameters, in training"
        in page.text
    )
    assert "not calibrated" in page.text and "no record is kept" in page.text
    assert "frozen" in look(network.requires_grad_(False))[1]
    assert "average of costs" in look(
        CouplingNetwork(replace(SMALL, average="costs", position_gain=0.0))
    )[1]


def test_a_training_shows_its_curve_and_no_tensors():
    result = TrainingResult(
        20, False, [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 0.5}], {"w": torch.zeros(3)},
    )
    page, plain = look(result)
    assert plain.startswith(
        "TrainingResult: 20 steps, not finished"
    ) and "tensor" not in plain and "2.000" in page.text and "0.500" in page.text
    assert "no point of the curve yet" in look(TrainingResult(0, False, [], {}))[0].text


def test_a_transporter_says_what_is_loaded():
    for coupling, names, expected in (
        (None, {}, "no coupling, 0 concepts"),
        (CouplingNetwork(SMALL), {"vlm": "phi4"}, "vlm='phi4', 0 concepts"),
    ):
        empty = Transporter.__new__(Transporter)  # its models are not looked at
        vars(empty).update(coupling=coupling, names=names, bank=ConceptBank())
        assert repr(empty) == f"Transporter({expected})"


def test_large_clips_become_small_on_a_page():
    e = explanation(certified=False)
    wide = replace(
        e, videos=torch.rand(3, 60, 3, 90, 200, generator=torch.Generator().manual_seed(0)),
    )
    shown = wide.moving()
    assert (shown.width, shown.height, shown.frames) == (
        128, 57, 15,
    ) and shown.frames / shown.fps == pytest.approx(10)
    look(wide)


def test_a_picture_needs_words():
    gif = show_gif(demo_video()).data
    with pytest.raises(ValueError, match="alt says what there is to see"): html_image(gif, "")
    assert Page(html_image(gif, "two \"discs\" <moving>")).images[0][
        "alt"
    ] == "two \"discs\" <moving>"
    assert Page(html_table([["a"], ["<td>"]])).text == "a<td>" and Page(html_table([])).text == ""
