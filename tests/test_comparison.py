"""The comparison of methods: the same questions to all, a judge that a planted error cannot fool,
rows that are made once."""

from dataclasses import replace

import pytest
import torch

from transporter_nb.evaluate.comparison import (
    MEASURES, SINGLE_CONTRASTS, case_keys, comparison_cases, concept_key, digest_of_clips,
    from_bytes, generation_of, judged_row, kept_sweep, learned_captions, load_judge,
    real_statistics, target_probability, to_bytes,
)
from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.core.base import checkpoint_path
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.evaluate.rows import RowCache, compare_rows
from transporter_nb.world.words import do, is_held_out, render, sample_scenes


@pytest.fixture(scope="module")
def judge():
    return load_judge(load_vlm("gemma3"), n_reference=64)


@pytest.fixture(scope="module")
def reference(judge):
    return real_statistics(judge)


@pytest.fixture(scope="module")
def cases():
    return comparison_cases(16)


def test_questions_are_held_out_and_cover_every_contrast(cases):
    assert [case.pair.name for case in cases] == list(SINGLE_CONTRASTS)
    assert all(is_held_out(case.scene) and is_held_out(case.target_scene) for case in cases)
    bank = ConceptBank.from_pretrained(checkpoint_path("concepts_phi4"))
    learned, kept = set(learned_captions(bank)), comparison_cases(64, avoid=learned_captions(bank))
    assert learned and not learned & {case.caption for case in kept}
    of_contrast = {
        name: {
            text
            for caption in bank[name].meta["captions"]
            for text in (caption, bank[name].pair.apply(caption))
        }
        for name in SINGLE_CONTRASTS
    }
    # a concept never saw where it is asked to go
    assert not any(case.target_caption in of_contrast[case.pair.name] for case in kept)


def test_exhausted_captions_are_refused(cases):
    every = [case.caption for case in comparison_cases(800, contrasts=("red -> blue",))]
    with pytest.raises(ValueError, match="no held-out caption is left for 'red -> blue'"):
        comparison_cases(4, contrasts=("red -> blue",), avoid=every)


def test_real_clips_of_the_target_are_the_ceiling(judge, reference, cases):
    base, target = render([case.scene for case in cases]), render(
        [case.target_scene for case in cases]
    )
    found = judged_row(judge, target, base, cases, reference)
    assert set(found["cells"]) == {"FVD-mini", *MEASURES}
    for name in ("target read", "others kept", "readable"):
        assert found["cells"][name].value == 1, name
    assert found["cells"]["VLM's p(target)"].value > .95 and found["cells"][
        "alignment gain"
    ].low > 0
    unsteered = judged_row(judge, base, base, cases, reference)
    assert unsteered["cells"]["target read"].value == 0 and unsteered["cells"][
        "alignment gain"
    ].value == 0 and unsteered["cells"]["LPIPS-mini to base"].value < 1e-5


def test_swapped_methods_change_the_table_as_they_must(judge, reference, cases):
    """Planted error: the outputs of a perfect method and of a broken one are exchanged."""
    base = render([case.scene for case in cases])
    good = render([case.target_scene for case in cases])
    broken = (
        base + .35 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 1)
    rows = {
        name: judged_row(judge, video, base, cases, reference)
        for name, video in (("good", good), ("broken", broken))
    }
    swapped = {
        name: judged_row(judge, video, base, cases, reference)
        for name, video in (("good", broken), ("broken", good))
    }
    for name in ("target read", "readable", "CLIP-mini", "alignment gain"):
        right, wrong = (
            compare_rows(table["good"]["clips"][name], table["broken"]["clips"][name], 0)
            for table in (rows, swapped)
        )
        assert right.low > 0 and wrong.high < 0, name
    assert rows["good"]["cells"]["FVD-mini"].high < rows["broken"]["cells"]["FVD-mini"].low


def test_shuffled_captions_cost_every_column_that_knows_words(judge, reference, cases):
    base, good = (
        render([getattr(case, part) for case in cases]) for part in ("scene", "target_scene")
    )
    own, others = (
        judged_row(judge, good, base, questions, reference)
        for questions in (cases, cases[1:] + cases[:1])
    )
    for name in ("target read", "others kept", "CLIP-mini"):
        assert compare_rows(own["clips"][name], others["clips"][name], 0).low > 0, name
    # these know of no words
    for name in ("readable", "LPIPS-mini to real"):
        assert own["clips"][name] == others["clips"][name], name


def test_the_vlm_is_asked_clip_by_clip(judge, cases):
    target = render([case.target_scene for case in cases])
    together, apart = target_probability(judge.vlm, target, cases), torch.cat(
        [target_probability(judge.vlm, target[k:k + 1], cases[k:k + 1]) for k in range(3)]
    )
    assert torch.allclose(together[:3], apart, atol=1e-5)


def test_a_sweep_is_made_once_and_altered_clips_are_refused(tmp_path):
    generator, bank = load_generator(), ConceptBank.from_pretrained(
        checkpoint_path("concepts_phi4")
    )
    cases = comparison_cases(2, contrasts=("red -> blue",), avoid=learned_captions(bank))
    caches = [RowCache(tmp_path) for _ in range(3)]
    first, again = (kept_sweep(cache, generator, bank, "concept", cases) for cache in caches[:2])
    assert torch.equal(first.tensors["video"], again.tensors["video"])
    assert first.tensors["video"].shape == (2, 5, 9, 3, 32, 32)
    kept_sweep(caches[2], generator, bank, "concept", cases[:1]) # other cases are another row
    assert [[use.computed for use in cache.uses] for cache in caches] == [[True], [False], [True]]
    # guided steps of each clip, shared first steps counted once
    assert first.values["evaluations a clip"] > 12
    file = sorted(tmp_path.glob("clips-concept*"), key=lambda path: path.stat().st_size)[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="altered"):
        kept_sweep(RowCache(tmp_path), generator, bank, "concept", cases)


def test_colours_survive_as_bytes():
    video = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert (from_bytes(to_bytes(video)) - video).abs().max() <= .5 / 255 + 1e-6
    assert digest_of_clips(video) == digest_of_clips(
        from_bytes(to_bytes(video))
    ) != digest_of_clips(1 - video)
    assert case_keys(comparison_cases(2)) != case_keys(comparison_cases(2, seed=1))


def test_wrong_numbers_of_clips_are_refused(judge, reference, cases):
    video = render([case.scene for case in cases[:2]])
    with pytest.raises(ValueError, match="one clip and one unsteered clip a case"):
        judged_row(judge, video, video, cases[:3], reference)


def test_keys_hold_what_decides_the_clips(monkeypatch):
    generator, concept = load_generator(), ConceptBank.from_pretrained(
        checkpoint_path("concepts_phi4")
    )["red -> blue"]
    before = generation_of(generator)
    monkeypatch.setattr(generator, "default_steps", 3)
    assert generation_of(generator) != before
    others = (
        replace(concept, config=replace(concept.config, placement="word")),
        replace(concept, meta={**concept.meta, "captions": ["?"]}),
        replace(concept, vectors=concept.vectors + 1),
    )
    assert len({concept_key(one) for one in (concept, *others)}) == 4
