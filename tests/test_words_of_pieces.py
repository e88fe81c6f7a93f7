"""Words that a tokenizer cuts into pieces: the whole word counts, and nothing changes for others"""
import itertools
import re

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.evaluate.baselines.objectives import TargetToken
from transporter_nb.evaluate.disagreement import answers_to, questions_between
from transporter_nb.explain.answer_table import read_answers
from transporter_nb.explain.certificate import vlm_reader
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.answers import (
    answer_divergence, answer_gap, ask_pair, ask_words, finish_words, pair_ids, pair_turns,
    word_answers, word_log_probs,
)
from transporter_nb.models.testing import LinearGenerator, tiny_vlm
from transporter_nb.models.vlms.base import (
    DESCRIBE, PackedTurns, Turn, VideoLanguageModel, pack_turns, world_words,
)
from transporter_nb.models.vlms.smollm2 import FILE, find_language_model
from transporter_nb.world.contrasts import MINI_CONTRASTS, PAPER_CONTRASTS, ContrastPair
from transporter_nb.world.words import SLOTS, Scene, caption

CUT = {"stone", "snowy", "sandy", "red", "blue", "slowly", "quickly"}
PIECES = ["s", "##tone", "##nowy", "##andy", "r", "##ed", "bl", "##ue", "##low", "##ly", "qu",
          "##ick"]
CAPTION = "one large red ball slides left slowly over a stone floor"


def cut_words(vlm):
    "The same vocabulary, with some of the world's words in pieces"
    vocabulary, special = vlm.tokenizer.get_vocab(), vlm.tokenizer.all_special_tokens
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")])
    core.decoder = decoders.WordPiece()
    vlm.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=vlm.special_tokens[0], unk_token=vlm.special_tokens[1],
        additional_special_tokens=special[2:])
    return vlm


@pytest.fixture(scope="module", params=["phi4", "gemma3", "videollama3"])
def vlm(request):
    words = [word for word in world_words() if word not in CUT] + PIECES
    sizes = {"vision_size": 16} if request.param == "videollama3" else {}
    return cut_words(tiny_vlm(request.param, words=words, **sizes))


def clips(n):
    return torch.rand(n, 5, 3, 16, 16, generator=torch.Generator().manual_seed(n))


def said_alone(vlm, tokens, prefix, pieces):
    "Probability of a word, one piece a pass, without anything beside it"
    said, p = vlm.prompt_ids(DESCRIBE, prefix), 1.
    for piece in pieces:
        text = PackedTurns(*pack_turns([[said]] * len(tokens), 0))
        row = vlm.text_logits(tokens, text)[:, len(said) - 1].float().softmax(-1)
        p, said = p * row[:, piece], [*said, piece]
    return p


@pytest.mark.parametrize("change", ["red -> blue", "stone -> snowy", "slowly -> quickly",
                                    "ball -> blue", "red+stone -> blue+sandy"])
def test_a_word_counts_with_all_its_pieces(vlm, change):
    pair, tokens = ContrastPair(*change.split(" -> ")), vlm.embed(clips(3))
    answers = word_answers(vlm, tokens, pair, CAPTION)
    assert torch.allclose(answers.logsumexp(-1), torch.zeros(3, len(pair.words)), atol=1e-5)
    found = word_log_probs(answers, pair_ids(vlm, pair, CAPTION).expand(3, -1, -1)).exp()
    places = zip(pair.prefixes(CAPTION), pair.words_in(CAPTION))
    for w, (prefix, words) in enumerate(places):
        for side, word in enumerate(words):
            alone = said_alone(vlm, tokens, prefix, vlm.piece_ids(word, prefix))
            assert torch.allclose(found[:, w, side], alone, rtol=1e-4), (prefix, word)


def test_words_of_one_piece_are_asked_as_before(vlm):
    pair, tokens = ContrastPair("large+left", "small+right"), vlm.embed(clips(2))
    turns = [pair_turns(pair, CAPTION)] * 2
    assert word_answers(vlm, tokens, pair, CAPTION).equal(vlm.turn_log_probs(tokens, turns))
    assert pair_ids(vlm, pair, CAPTION).tolist() == [
        [vlm.token_id("large", "one"), vlm.token_id("small", "one")],
        [vlm.token_id(word, "one large red ball slides") for word in ("left", "right")]]


def speaks(vlm, word, prefix):
    "Logits of a model that says one word, piece by piece, and ends"
    pieces = vlm.piece_ids(word, prefix)
    after = torch.full((len(vlm.tokenizer),), pieces[0])
    for piece, following in zip(pieces, [*pieces[1:], vlm.end_id]): after[piece] = following
    def text_logits(tokens, text):
        return 20. * torch.nn.functional.one_hot(after[text.token_ids], len(after))
    return text_logits


def test_first_pieces_become_the_words_that_the_vlm_would_say(vlm, monkeypatch):
    prefix = "one large red ball slides left slowly over a"
    turn, tokens = Turn(DESCRIBE, prefix), vlm.embed(clips(2))
    for word in ("snowy", "stone", "large"):
        monkeypatch.setattr(vlm, "text_logits", speaks(vlm, word, prefix), raising=False)
        pieces = vlm.piece_ids(word, prefix)
        assert finish_words(vlm, tokens, turn, pieces[:1]) == [pieces]


@pytest.mark.parametrize("word, number", [("stone", 0), ("snowy", 1), ("sandy", -1), ("red", -1)])
def test_a_question_is_answered_by_whole_words(vlm, monkeypatch, word, number):
    asked = questions_between(vlm, [CAPTION], [CAPTION.replace("stone", "snowy")])
    prefix = asked[0].asked.turn.prefix
    assert len(asked[0].asked.pieces[0]) > 1 and len({p[0] for p in asked[0].asked.pieces}) == 1
    monkeypatch.setattr(vlm, "text_logits", speaks(vlm, word, prefix), raising=False)
    assert answers_to(vlm, vlm.embed(clips(1)), asked).tolist() == [number]


def test_one_pass_answers_about_all_words(vlm, monkeypatch):
    passes, own = [], type(vlm).text_logits
    monkeypatch.setattr(type(vlm), "text_logits",
                        lambda self, *parts: (passes.append(1), own(self, *parts))[1])
    word_answers(vlm, vlm.embed(clips(2)), ContrastPair("red+stone", "blue+snowy"), CAPTION)
    assert len(passes) == 1


def test_gap_divergence_table_and_baseline_take_whole_words(vlm):
    pair, tokens = ContrastPair("stone", "snowy"), vlm.embed(clips(3)).requires_grad_()
    ids = pair_ids(vlm, pair, CAPTION).expand(3, -1, -1)
    answers = word_answers(vlm, tokens, pair, CAPTION)
    source, target = word_log_probs(answers, ids).unbind(-1)
    assert torch.allclose(answer_gap(answers, ids), (target - source)[:, 0])
    p = target[:, 0].exp()
    assert torch.allclose(answer_gap(answers, ids, "vocab"), (p / (1 - p)).log(), atol=1e-4)
    for over, distance in itertools.product(("pair", "vocab"), ("hellinger", "kl", "jaccard")):
        moved = answer_divergence(answers[:1], answers[1:2], ids[:1], distance, over)
        assert 0 < moved.item() < 1
        assert torch.autograd.grad(moved.sum(), tokens, retain_graph=True)[0].isfinite().all()
    table = read_answers(vlm, tokens.detach(), pair, CAPTION)
    assert torch.allclose(table.target, target[1:].exp().detach())
    asked = TargetToken(vlm, pair, [CAPTION] * 3)
    assert torch.allclose(asked(clips(3)), -target[:, 0], atol=1e-5)


def test_clips_with_different_captions_share_a_batch(vlm):
    pair, tokens = ContrastPair("ball", "ring"), vlm.embed(clips(2))
    captions = [CAPTION, CAPTION.replace("one", "two").replace("ball", "balls")]
    mixed = word_answers(vlm, tokens, [pair, ContrastPair("red", "blue")], captions)
    ids = torch.stack([pair_ids(vlm, pair, CAPTION),
                       pair_ids(vlm, ContrastPair("red", "blue"), captions[1])])
    found = word_log_probs(mixed, ids).exp()
    alone = word_answers(vlm, tokens[:1], pair, CAPTION)
    assert torch.allclose(found[0], word_log_probs(alone, ids[:1])[0].exp(), rtol=1e-4)
    assert torch.allclose(mixed.logsumexp(-1), torch.zeros(2, 1), atol=1e-5)


def test_the_reader_says_words_and_not_their_first_pieces(vlm):
    reader = vlm_reader(vlm, ContrastPair("large", "small"), CAPTION)
    read = reader.read(clips(2), vlm.embed(clips(2)))
    assert all(set(row) == set(reader.words) for row in read)
    assert not any(word == "s" for row in read for word in row.values())


@pytest.mark.parametrize("change", ["stone -> snowy", "stone+red -> sandy+blue"])
def test_words_with_one_first_piece_are_explained(vlm, change):
    generator, pair = LinearGenerator(prompt_tokens=12), ContrastPair(*change.split(" -> "))
    vectors = torch.randn(len(pair.words), 3, generator=torch.Generator().manual_seed(0))
    l2v = Transporter(generator, vlm)
    directions = [Concept(ContrastPair(*words), vectors[k:k + 1],
                          ConceptConfig(placement="word"))
                  for k, words in enumerate(pair.words)]
    l2v.bank = ConceptBank(directions)
    e = l2v.explain(CAPTION, [direction.pair for direction in directions], strengths=[0., 1.],
                    progress=False)
    assert (e.reencoded.source != e.reencoded.target).all()


def test_words_with_the_same_tokens_are_refused_before_the_generator_runs(vlm):
    l2v, calls = Transporter(LinearGenerator(prompt_tokens=12), vlm), []
    l2v.generator.velocity = lambda *parts: calls.append(parts)
    with pytest.raises(ValueError, match="changes every word it names|with the same tokens"):
        l2v.explain(CAPTION, "red -> RED", progress=False)
    assert not calls


class Speller(VideoLanguageModel):
    "Only a tokenizer"
    name, n_tokens, vlm_dim = "speller", 1, 1
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
    def embed(self, video): raise NotImplementedError
    def text_logits(self, vlm_embeddings, text): raise NotImplementedError
    def prompt_ids(self, question, prefix=""): raise NotImplementedError


@pytest.fixture(scope="module", params=["SmolLM2", "bytes of 300", "words of 300"])
def speller(request):
    "The tokenizers at hand: a real one, and two so small that every word has pieces"
    if request.param == "SmolLM2":
        folder = find_language_model()
        if folder is None: pytest.skip("make language was not run")
        return Speller(AutoTokenizer.from_pretrained(folder, gguf_file=FILE))
    marked = request.param.startswith("words") # a sign for the blank, as in Gemma's
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace() if marked else pre_tokenizers.ByteLevel(
        add_prefix_space=False)
    core.decoder = decoders.Metaspace() if marked else decoders.ByteLevel()
    texts = [entry.caption for entry in PAPER_CONTRASTS.values()]
    alphabet = [] if marked else pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*texts, *(entry.pair.apply(entry.caption) for entry in PAPER_CONTRASTS.values())],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return Speller(PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize("name", PAPER_CONTRASTS)
def test_the_contrasts_of_the_paper_are_spelt_in_full(speller, name):
    entry = PAPER_CONTRASTS[name]
    asked = ask_pair(speller, entry.pair, entry.caption)
    for place, words in zip(asked, entry.pair.words_in(entry.caption)):
        said = speller.word_ids(place.turn.prefix) if place.turn.prefix else []
        for word, pieces in zip(words, place.pieces):
            text = speller.tokenizer.decode(said + pieces).strip()
            assert text == f"{place.turn.prefix} {word}".strip()


def test_a_word_that_changes_the_tokens_before_it_is_refused():
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4},
                                merges=[("a", " "), ("a ", "b")]))
    speller = Speller(PreTrainedTokenizerFast(tokenizer_object=core))
    with pytest.raises(ValueError, match="other tokens before 'b'"): speller.piece_ids("b", "a")


@pytest.mark.parametrize("name", PAPER_CONTRASTS)
def test_target_captions_of_the_paper_are_english(name):
    entry = PAPER_CONTRASTS[name]
    target = entry.pair.apply(entry.caption)
    assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", target), target
    counted = re.search(r"\bone \w+s\b|\btwo \w+[^s]\b", target)
    assert counted is None, target


@pytest.mark.parametrize("change, source, target", [
    ("young+swift -> old+slow", "A young athlete makes a swift throw",
     "An old athlete makes a slow throw"),
    ("two+thin -> one+thick", "A cook cuts two peppers into thin strips",
     "A cook cuts one pepper into thick strips"),
    ("one -> two", "A cook cuts one pepper into thin strips",
     "A cook cuts two peppers into thin strips"),
    ("two -> one", "Two people are canoeing on lakes", "One person is canoeing on lakes"),
    ("one -> three", "one child quickly catches leaves", "three children quickly catch leaves"),
    ("wide -> honest", "A wide smile", "An honest smile"),
    ("old -> European", "An old car", "A European car"),
    ("two+red -> one+ugly", "two red balls slide left over two mats",
     "one ugly ball slides left over one mat"),
])
def test_articles_and_numbers_agree(change, source, target):
    assert ContrastPair(*change.split(" -> ")).apply(source) == target


@pytest.mark.parametrize("name", MINI_CONTRASTS)
def test_the_worlds_words_need_no_library(name, monkeypatch):
    from transporter_nb.world import contrasts
    monkeypatch.setattr(contrasts, "english", lambda: pytest.fail("the library was loaded"))
    pair = MINI_CONTRASTS[name].pair
    slot_of = {word: slot for slot, words in SLOTS.items() for word in words}
    words = {slot: words[0] for slot, words in SLOTS.items()}
    text = caption(Scene(*(words | {slot_of[old]: old for old, _ in pair.words}).values()))
    assert pair.apply(text) != text


def test_ask_words_wants_words_that_differ(vlm):
    with pytest.raises(ValueError, match="with the same tokens"):
        ask_words(vlm, Turn(DESCRIBE, "one large"), ["red", "blue", "Red"])
