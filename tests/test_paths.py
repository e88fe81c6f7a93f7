"""Concepts as paths: on a line that can be worked out by hand, by properties, saved and loaded, and
in the seat of a concept"""
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig, Direction
from transporter_nb.concepts.directions import TargetCaption
from transporter_nb.concepts.paths import (
    ConceptPath, ask_way_points, by_arc_length, even_knots, load_paths, offsets_at, path_through,
    save_paths, shift_along,
)
from transporter_nb.core.base import checkpoint_path
from transporter_nb.coupling.network import CouplingNetwork
from transporter_nb.explain.certificate import RandomLike, certify
from transporter_nb.explain.exploration import Request
from transporter_nb.explain.recipe import lessons, papermill_line, python_cell
from transporter_nb.explain.steering import steer
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.generators.base import PromptCondition, VideoGenerator
from transporter_nb.models.pairing import check_concepts, made_for
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.models.view import Models
from transporter_nb.models.vlms.base import VideoLanguageModel, word_tokenizer
from transporter_nb.world.contrasts import parse_contrast

WORDS = {"cold": 0., "cool": 1., "warm": 3., "hot": 4., "boiling": 8.}
CAPTION = "a cold day"
HEAT = parse_contrast("cold -> boiling")


class Heat(VideoGenerator):
    "A clip's level is the sum of the prompt's words; a phrase of two words is their mean, twice"
    name, text_dim, latent_channels, default_steps, default_guidance = "heat", 1, 1, 2, 1.0
    config = SimpleNamespace(frames=1)

    def __init__(self, seen=lambda level: level / 10):
        super().__init__()
        self.seen, self.asked = seen, 0
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode_prompt(self, prompts):
        embeds, mask = torch.zeros(len(prompts), 5, 1), torch.zeros(len(prompts), 5).bool()
        for row, prompt in enumerate(prompts):
            for k, word in enumerate(prompt.split()):
                if word not in (*WORDS, "a", "day", "very"): raise ValueError(f"no word {word!r}")
                embeds[row, k], mask[row, k] = WORDS.get(word, 0.), True
        return PromptCondition(embeds, mask)

    def token_positions(self, prompt, start_char, end_char):
        first = len(prompt[:start_char].split())
        return list(range(first, first + len(prompt[start_char:end_char].split())))

    def velocity(self, latents, condition, t):
        goal = condition.expand_to(len(latents)).embeds.sum((1, 2))[:, None, None, None, None]
        return (goal - latents) / max(1 - float(torch.as_tensor(t).max()), 1e-6)

    def encode(self, video): raise NotImplementedError

    def decode(self, latents):
        self.asked += len(latents)
        return self.seen(latents.transpose(1, 2)).expand(-1, -1, 3, -1, -1)

    def latent_shape(self, n): return (n, 1, 1, 1, 1)
    def times(self, steps): return torch.linspace(0, 1, steps + 1)


class Thermometer(VideoLanguageModel):
    "Says the word nearest to the level, surely"
    name, n_tokens, vlm_dim = "thermometer", 1, 1

    def __init__(self):
        super().__init__()
        self.words = ["a", "day", "very", *WORDS, "tropical"] # a word that the generator lacks
        self.tokenizer, self.end_id = word_tokenizer(self.words, ["<pad>", "<unk>"]), 0
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def embed(self, video): return 10 * video[:, :1, 0, 0]
    def prompt_ids(self, question, prefix=""): return self.word_ids(prefix) if prefix else [0]
    def probe_clip(self): return torch.full((1, 1, 3, 1, 1), .3)

    def text_logits(self, vlm_embeddings, text):
        level = vlm_embeddings[:, 0]
        near = -5 * (level - torch.tensor(list(WORDS.values()))).abs()
        logits = torch.full((len(level), len(self.words) + 2), -60.)
        logits[:, 5:10] = near
        return logits[:, None].expand(-1, text.token_ids.shape[1], -1)


def level(video): return 10 * video[:, 0, 0, 0, 0]
def apart(video, other): return (level(video) - level(other)).abs()


def swept(generator, path, strengths):
    condition = path.condition(generator, CAPTION, torch.as_tensor(strengths))
    return level(generator.decode(generator.sample(condition, seeds=[0] * len(condition))))


def test_a_path_visits_its_words_by_hand():
    path = ConceptPath(HEAT, ["cool", "hot"])
    levels = swept(Heat(), path, [0., 1 / 6, 1 / 3, .5, 2 / 3, 5 / 6, 1., 1.25])
    # from 4 to 8 in the last piece; a quarter beyond 1 is three quarters of a piece
    assert levels.tolist() == pytest.approx([0, .5, 1, 2.5, 4, 6, 8, 11], abs=1e-5)


def test_a_path_without_way_points_is_the_target_caption():
    heat, strengths = Heat(), torch.tensor([0., .3, 1., 1.5])
    straight = offsets_at(ConceptPath(HEAT), heat, CAPTION, strengths)
    torch.testing.assert_close(straight, offsets_at(TargetCaption(HEAT), heat, CAPTION, strengths))
    assert isinstance(ConceptPath(HEAT), Direction)


def test_tokens_of_a_long_way_point_are_seen_only_near_it():
    path, heat = ConceptPath(HEAT, ["very hot"]), Heat()
    mask = path.condition(heat, CAPTION, torch.tensor([0., .25, .5, 1.])).mask
    # `a very hot day` has four tokens; `very` and `day` are zeros, `hot` is the third
    assert mask.sum(1).tolist() == [3, 3, 3, 3]
    longer = ConceptPath(HEAT, ["a hot cool"]).condition(heat, "cold", torch.tensor([0., .5, 1.]))
    assert longer.mask.sum(1).tolist() == [1, 3, 1]


LEGS = st.integers(1, 4)


@st.composite
def knotted(draw):
    n = draw(LEGS)
    steps = draw(st.lists(st.floats(0, 1), min_size=3, max_size=9).filter(lambda x: sum(x) > .1))
    places = [n * k / len(steps) for k in range(len(steps) + 1)]
    return ConceptPath(HEAT, list(WORDS)[1:n], even_knots(places, steps))


@settings(max_examples=60, deadline=None)
@given(knotted(), st.lists(st.floats(0, 1.5, width=32), min_size=2, max_size=9))
def test_places_rise_with_strength_and_stay_on_the_path(path, strengths):
    places = path.place(torch.tensor(sorted(strengths)))
    assert (places.diff() >= 0).all() and places[0] >= 0
    n = len(path.between) + 1
    ends = path.place(torch.tensor([0., 1., 1.5]))
    assert ends.tolist() == pytest.approx([0, n, 1.5 * n])


@settings(max_examples=60, deadline=None)
@given(knotted(), st.floats(0, 1))
def test_a_place_has_its_strength(path, share):
    place = share * (len(path.between) + 1)
    strength = path.strength(place)
    back = path.place(torch.tensor([strength], dtype=torch.float64)).item()
    assert back <= place + 1e-6 or strength == 1 # the first place of an unchanging stretch
    assert path.strength(back) == pytest.approx(strength, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(knotted(), st.floats(0, 1, width=32))
def test_reversed_is_the_same_way_back(path, strength):
    n, back = len(path.between) + 1, path.reversed()
    assert back.reversed().words == path.words
    place = back.place(torch.tensor([strength])).item()
    assert path.strength(n - place) == pytest.approx(1 - strength, abs=1e-6)


def test_the_length_of_an_arc_by_hand():
    path, heat = ConceptPath(HEAT, ["cool", "hot"]), Heat()
    even = by_arc_length(path, apart, heat, CAPTION, [0, 1], per_leg=4, rounds=0)
    assert [even.strength(k) for k in range(4)] == pytest.approx([0, 1 / 8, 4 / 8, 1])
    levels = swept(heat, even, torch.linspace(0, 1, 9))
    assert levels.tolist() == pytest.approx(list(range(9)), abs=1e-4)
    assert heat.asked == 13 * 2 + 1 + 9 # the record of the generator takes one


def test_rounds_find_a_jump():
    "A generator that jumps at level 5.1: nothing else is seen"
    jumping = Heat(lambda value: (value > 5.1).to(value) * .8)
    path = ConceptPath(HEAT)
    coarse = by_arc_length(path, apart, jumping, CAPTION, [0], per_leg=4, rounds=0)
    fine = by_arc_length(path, apart, jumping, CAPTION, [0], per_leg=4, rounds=5)
    spans = []
    for found in (coarse, fine):
        inside = found.place(torch.tensor([.001, .999]))
        spans.append((inside[1] - inside[0]).item())
        assert inside[0] < 5.1 / 8 < inside[1]
    assert spans[0] == pytest.approx(1 / 4, rel=.01) and spans[1] == pytest.approx(1 / 128, rel=.01)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(.01, 3), min_size=2, max_size=12))
def test_strength_is_the_share_of_the_arc(seen):
    knots = even_knots(range(len(seen) + 1), seen)
    for k, (strength, place) in enumerate(knots):
        assert place == k and strength == pytest.approx(sum(seen[:k]) / sum(seen))


def test_a_vlm_names_the_way_points():
    heat, vlm = Heat(), Thermometer()
    path = ask_way_points(Models(heat, vlm), HEAT, CAPTION, [0, 1])
    # half way to 8 is 4, hot; to 4 is 2, cool or warm alike; from 4 to 8 is 6, hot or boiling
    assert path.words[0] == "cold" and path.words[-2:] == ("hot", "boiling")
    assert len(path.words) == 4 and path.words[1] in ("cool", "warm")
    assert [row["between"] for row in path.meta["asked"]] == [
        "cold -> boiling", "cold -> hot", "hot -> boiling"]
    assert path.meta["asked"][0]["answers"]["hot"] > .99
    assert "tropical" not in path.meta["asked"][0]["answers"]
    assert ask_way_points(Models(heat, vlm), HEAT, CAPTION, [0], depth=1).between == ("hot",)
    assert path.meta["vlm"] == "thermometer"


def test_saved_and_loaded(tmp_path):
    heat, vlm = Heat(), Thermometer()
    asked = ask_way_points(Models(heat, vlm), HEAT, CAPTION, [0])
    even = by_arc_length(asked, apart, heat, CAPTION, [0])
    other = by_arc_length(path_through("cool -> hot", ["warm"]), apart, heat, "a cool day", [0])
    again = load_paths(save_paths(tmp_path / "paths.safetensors", [even, other]))
    for path in (even, other):
        loaded = again[path.pair.name]
        assert (loaded.words, loaded.knots, loaded.pair) == (path.words, path.knots, path.pair)
        assert loaded.meta["arc_length"] == path.meta["arc_length"]
    assert even.meta["made_for"] == made_for(heat, vlm)
    assert other.meta["made_for"]["vlm"] is None
    check_concepts(list(again.values()), heat, vlm)
    colder = Heat(lambda value: value / 20)
    colder.encode_prompt = lambda prompts: PromptCondition(
        torch.ones(len(prompts), 5, 1), torch.ones(len(prompts), 5).bool())
    with pytest.raises(ValueError, match="Make the path anew"):
        check_concepts([again["cool -> hot"]], colder, vlm)
    renamed = Thermometer()
    renamed.name = "another"
    with pytest.raises(ValueError, match="Ask this VLM with ask_way_points"):
        check_concepts([again[HEAT.name]], heat, renamed)
    check_concepts([again["cool -> hot"]], heat, renamed) # no VLM had a part in it


def test_steering_takes_a_path_beside_a_concept():
    heat = Heat()
    path = ConceptPath(HEAT, ["cool", "hot"])
    hotter = Concept(HEAT, torch.full((1, 1), 2.), ConceptConfig(placement="word"))
    table = [[0, 0], [1 / 3, 0], [1, .5], [.5, 1]]
    run = steer(heat, CAPTION, heat.noise([3]), [path, hotter], table)
    levels = level(heat.decode(run.latents[0]))
    assert levels.tolist() == pytest.approx([0, 1, 9, 4.5], abs=1e-4)
    alone = steer(heat, CAPTION, heat.noise([3]), path, [0, .5, 1])
    assert level(heat.decode(alone.latents[0])).tolist() == pytest.approx([0, 2.5, 8], abs=1e-4)
    late = steer(heat, CAPTION, heat.noise([3]), path, [.5], start_step=1)
    assert level(heat.decode(late.latents[0])).item() == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize("make, message", [
    (lambda: ConceptPath(HEAT, ["cold"]), "got cold twice in cold > cold > boiling"),
    (lambda: ConceptPath(HEAT, "cool"), r"such as \['pink'\], got 'cool'"),
    (lambda: ConceptPath(HEAT, ["cool", " "]), "way points are words"),
    (lambda: ConceptPath(parse_contrast("a+b -> c+d")), "a path changes one word"),
    (lambda: ConceptPath(HEAT, ["cool"], ((0, 0), (1, 1))), r"rise from \(0, 0\) to \(1, 2\)"),
    (lambda: ConceptPath(HEAT, [], ((0, 0), (math.nan, .5), (1, 1))), "measure them with by_arc"),
    (lambda: ConceptPath(HEAT).place(torch.tensor([math.nan])), "strengths on a path"),
    (lambda: ConceptPath(HEAT).strength(1.5), r"from 0 \(the source\) to 1 \(the target\)"),
    (lambda: path_through("cold -> hot", ["tepid"], Heat(), CAPTION), "no word 'tepid'"),
    (lambda: path_through("cold -> hot", "warm"), "a list of words in order, got 'warm'"),
    (lambda: path_through("cold -> hot", ["cool"], Heat(), "a hot day"), "does not hold 'cold'"),
    (lambda: even_knots([0, 1], [0.]), "Use another distance"),
    (lambda: even_knots([0, 1, 2], [1.]), "neighbours of 3 places"),
    (lambda: by_arc_length(ConceptPath(HEAT), apart, Heat(), CAPTION, []), "a seed or more"),
    (lambda: by_arc_length(ConceptPath(HEAT), lambda a, b: apart(a, b) / 0 * 0, Heat(), CAPTION),
     "not finite for any of 4 seeds"),
    (lambda: ask_way_points(Models(Heat(), Thermometer()), HEAT, CAPTION, least=1.),
     "least from 0"),
    (lambda: save_paths("x.safetensors", [ConceptPath(HEAT)] * 2), "cold -> boiling twice"),
    (lambda: shift_along(Heat().encode_prompt(["a", "a"]), torch.zeros(1, 2, 5, 1)), "got 2 rows"),
])
def test_errors_say_what_and_how(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_a_bank_saves_no_path(tmp_path):
    with pytest.raises(AttributeError, match="Use save_paths"):
        ConceptBank([ConceptPath(HEAT)]).save_pretrained(tmp_path / "bank.safetensors")


def test_explain_takes_a_path_from_the_bank():
    wan, vlm = load_generator(device="cpu"), load_vlm("phi4", device="cpu")
    coupling = CouplingNetwork.from_pretrained(checkpoint_path("coupling_phi4"))
    path = path_through("red -> green", ["yellow"])
    l2v = Transporter(wan, vlm, coupling, ConceptBank([path]))
    caption = "one large red ball slides left slowly over a stone floor"
    found = l2v.explain(caption, "red -> green", strengths=[.5, 1], steps=2, progress=False)
    record = found.settings["concepts"][0]
    assert record["config"]["words"] == ["red", "yellow", "green"]
    yellow = caption.replace("red", "yellow")
    wanted = wan.sample(wan.encode_prompt([yellow]), noise=wan.noise([0]), steps=2)
    torch.testing.assert_close(found.latents[:1], wanted, atol=1e-4, rtol=1e-4)


def test_a_vlm_weight_between_0_and_1_refuses_a_path():
    wan, vlm = load_generator(device="cpu"), load_vlm("phi4", device="cpu")
    l2v = Transporter(wan, vlm, None, ConceptBank([path_through("red -> green", ["yellow"])]))
    with pytest.raises(ValueError, match="'red -> green' is a path"):
        l2v.directions("one large red ball slides left slowly over a stone floor",
                       [parse_contrast("red -> green")], vlm_weight=.5)


def test_random_controls_of_a_path_are_as_long_as_the_path():
    path, heat = ConceptPath(HEAT, ["cool", "hot"]), Heat()
    strengths = torch.tensor([0., 1 / 6, 1 / 3, .5, 1.])
    control = offsets_at(RandomLike(path, 3), heat, CAPTION, strengths)
    own = path.offsets(heat, CAPTION, strengths)
    assert own.norm(dim=(1, 2)).tolist() == pytest.approx([0, .5, 1, 2.5, 8], abs=1e-5)
    torch.testing.assert_close(control.norm(dim=-1), own.norm(dim=-1))
    straight = TargetCaption(HEAT)
    control, own = (offsets_at(direction, heat, CAPTION, strengths)
                    for direction in (RandomLike(straight, 3), straight))
    torch.testing.assert_close(control.norm(dim=-1), own.norm(dim=-1))
    # half way the path is at level 2.5; each control adds as much or takes it away
    heat = Heat(lambda value: .5 + value / 20)
    made = certify(Models(heat, Thermometer()), CAPTION, path, .5, n_random=3, n_seeds=0)
    assert [clip.distance for clip in made.random] == pytest.approx([.125] * 3, abs=1e-5)


RED = "one large red ball slides left slowly over a stone floor"
BY_YELLOW = path_through("red -> green", ["yellow"], knots=[(0, 0), (.7, 1), (1, 2)])


def test_the_recipe_makes_a_path_again():
    l2v = Transporter.load(device="cpu")
    l2v.bank["red -> green"] = BY_YELLOW
    request = Request(RED, ("red -> green",))
    directions = l2v.directions(RED, [BY_YELLOW.pair])
    learned = lessons(l2v, directions)
    cell = python_cell(request, [(0,), (.7,)], l2v.names, learned)
    again = {}
    exec(cell, again)
    assert again["l2v"].bank["red -> green"].words == BY_YELLOW.words
    assert again["l2v"].bank["red -> green"].knots == BY_YELLOW.knots
    wanted = request.explain(l2v, [(0,), (.7,)])
    assert torch.equal(again["e"].videos, wanted.videos)
    with pytest.raises(ValueError, match="goes through yellow. Use the Python cell"):
        papermill_line(request, (.7,), l2v.names, learned)


def test_the_answers_have_a_column_for_every_way_point():
    wan, vlm = load_generator(device="cpu"), load_vlm("phi4", device="cpu")
    coupling = CouplingNetwork.from_pretrained(checkpoint_path("coupling_phi4"))
    l2v = Transporter(wan, vlm, coupling, ConceptBank([BY_YELLOW]))
    found = l2v.explain(RED, "red -> green", strengths=[0, .7, 1.], progress=False)
    names = list(found.answers[0])
    assert names[1:4] == ["p(red)", "p(green)", "p(yellow)"] and "p(yellow), Phi" in names
    passed = [row["p(yellow)"] for row in found.answers]
    assert passed[1] > .9 and passed[0] < .1 and passed[2] < .1
    turned = vlm.next_token_log_probs(vlm.embed(found.videos), "describe the video", "one large")
    by_hand = turned[:, vlm.token_id("yellow")].exp().tolist()
    assert passed == pytest.approx(by_hand, abs=1e-5)
    record = found.settings["concepts"][0]["config"]
    assert record == {"words": ["red", "yellow", "green"],
                      "knots": [[0, 0], [.7, 1], [1, 2]]} # no setting of a learning


ODD = """
from transporter_nb.concepts.directions import rms_distance
from transporter_nb.concepts.paths import *
from transporter_nb.evaluate.disagreement import *
from transporter_nb.models.testing import LinearGenerator, tiny_vlm
from transporter_nb.models.view import Models
from transporter_nb.world.contrasts import parse_contrast
import torch
wan, vlm = LinearGenerator(), tiny_vlm()
models, path, clips = Models(wan, vlm), ConceptPath("red -> blue"), torch.zeros(2, 5, 3, 16, 16)
for text in {odd!r}:
    try: made = eval(text)
    except ValueError as error: print(text, "|", error)
    except Exception as error: print("RAW", text, type(error).__name__, error)
    else: print("TAKEN", text, made)
"""
MESSAGES = {
    "ConceptPath('red -> blue', None)": "way points are words in a list",
    "ConceptPath(None)": "a contrast is written 'source -> target', got None",
    "ConceptPath('red -> blue', [], [1, 2])": "knots are (strength, place)",
    "ConceptPath('red -> blue', [], 3)": "knots are (strength, place)",
    "ConceptPath('red -> blue', [], [(0, 0), (None, 1)])": "knots are (strength, place)",
    "path.place(.5)": "Write torch.tensor([0.5, 1.0])",
    "path.place(None)": "Write torch.tensor([0.5, 1.0])",
    "path.strength(None)": "a place is a number from 0 (the source) to 1 (the target)",
    "ask_way_points(models, 'red -> blue', 'a red ball', 4)": "a list of a seed or more",
    "ask_way_points(models, 'red -> blue', 'a red ball', [0], least=None)": "least from 0",
    "ask_way_points(models, 'red -> blue', None)": "a caption is a text, got None",
    "ask_way_points(models, None, 'a red ball')": "a contrast is written",
    "by_arc_length(None, rms_distance, wan, 'a red ball')": "need a ConceptPath",
    "by_arc_length(path, None, wan, 'a red ball')": "a function of two batches of clips",
    "by_arc_length(path, rms_distance, wan, 'a red ball', seeds=3)": "need per_leg >= 1",
    "by_arc_length(path, rms_distance, wan, 'a red ball', per_leg=None)": "need per_leg >= 1",
    "save_paths('x.safetensors', path)": "Write [path] for one",
    "save_paths('x.safetensors', [None])": "paths is a list of ConceptPath",
    "disagreement(models, None, ['a', 'b'], .3, 0)": "need two clips or more",
    "disagreement(models, clips, None, .3, 0)": "captions None",
    "disagreement(models, clips, 'ab', .3, 0)": "captions a list of texts",
    "disagreement(models, clips, ['a', 'b'], None, 0)": "t = None",
    "disagreement(models, clips, ['a', 'b'], .3, None)": "need a whole seed",
    "disagreement(models, clips, ['a', 'b'], .3, 0, guidance='x')": "guidance=1.0 is none",
    "disagreement(models, clips, ['a', 'b'], .3, 0, batch_size=0)": "batch_size >= 1",
    "disagreement_table({})": "a table needs the shares",
    "disagreement_table(None)": "a table needs the shares",
    "Models(None, vlm)": "generator must be a VideoGenerator, got NoneType. Load one",
    "Models(wan, 'phi4')": "vlm must be a VideoLanguageModel, got str. Load one",
    "Models(wan, vlm, 'phi')": "Give a CouplingNetwork, or None",
}


def test_odd_arguments_are_answered_by_rule_value_and_fix():
    "Without the run-time types of these tests, as for a user"
    done = subprocess.run([sys.executable, "-c", ODD.format(odd=list(MESSAGES))],
                          capture_output=True, text=True, timeout=600)
    said = {line.split(" | ")[0]: line for line in done.stdout.splitlines()}
    for text, message in MESSAGES.items():
        assert message in said.get(text, ""), (text, done.stdout, done.stderr[-2000:])
