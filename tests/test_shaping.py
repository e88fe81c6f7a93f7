"""Concepts that a VLM's answers decide, by measuring and by gradient, against VLMs whose reasons
are known"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from transporter_nb.concepts.answer_gradients import (
    GradientConfig, WordGradientConfig, denoised_gaps, gradient_loss, guided_clips, latent_gap,
    learn_by_gradient, path_latents, word_effects, word_gradients,
)
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.concepts.learning import PartialSamples, partial_samples
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.core.base import tensor_digest
from transporter_nb.coupling.testing import tiny_coupling
from transporter_nb.concepts.directions import TargetCaption
from transporter_nb.models.registry import load_generator
from transporter_nb.concepts.shaping import (
    WORD_GROUPS, AnswerModel, ShapedConcept, ShapingConfig, balanced_captions, fit_answers,
    measure_answers, shape_concept, with_word, word_of,
)
from transporter_nb.models.testing import tiny_generator
from transporter_nb.models.view import Models
from transporter_nb.models.vlms.base import VideoLanguageModel, word_tokenizer, world_words
from transporter_nb.world.words import SLOTS, caption, do, read_video, sample_scenes

PACE = parse_contrast("slowly -> quickly")
SMALL = ShapingConfig(n_clips=32)  # cheaper than the default, and enough for an oracle
WITHOUT_FLOOR = tuple(group for group in WORD_GROUPS if group != SLOTS["floor"])


class PixelOracle(VideoLanguageModel):
    """A VLM without weights: one token, the mean colour of a clip; its gap is linear in it, so
    nothing saturates"""
    name, n_tokens, vlm_dim, end_id = "pixel oracle", 1, 3, 2

    def __init__(self, pair, weights, bias=0., gain=1.):
        super().__init__()
        self.tokenizer = word_tokenizer(world_words(), ("<pad>", "<unk>", "<end>"))
        self.targets, self.weights, self.bias, self.gain = [
            self.token_id(word) for _, word in pair.words
        ], torch.tensor(weights), bias, gain

    def embed(self, video): return video.mean((1, 3, 4))[:, None]

    def prompt_ids(self, question, prefix=""): return self.word_ids(f"{question} {prefix}".strip())

    def text_logits(self, vlm_embeddings, text):
        gap = self.gain * (vlm_embeddings[:, 0] @ self.weights + self.bias)
        logits = torch.zeros(*text.token_ids.shape, len(self.tokenizer))
        at = torch.zeros(len(self.tokenizer)).index_fill(0, torch.tensor(self.targets), 1.)
        return logits + gap[:, None, None] * at


def dark_oracle(gain=20., bias=.55):
    # sure of "quickly" where a clip is dark: floors decide nearly all of it
    return PixelOracle(PACE, [-1 / 3] * 3, bias, gain)


@pytest.fixture(scope="module")
def wan():
    torch.set_num_threads(1)
    return load_generator("wan", "mini", "cpu")


@pytest.fixture(scope="module")
def captions():
    return [
        caption(do(scene, pace="slowly", floor=("snowy", "sandy")[k % 2]))
        for k, scene in enumerate(sample_scenes(12, 750_001))
    ]


@pytest.fixture(scope="module")
def states(wan, captions):
    base, goal = (
        wan.encode_prompt(texts)
        for texts in (captions[:3], [PACE.apply(text) for text in captions[:3]])
    )
    return base, partial_samples(wan, base, goal, [0, 1, 2], steps=3)[0]


@pytest.fixture(scope="module")
def phi(wan):
    return tiny_coupling(
        wan.latent_shape(1)[1:], wan.text_dim, wan.config.prompt_tokens, vlm_tokens=1, vlm_dim=3)


@pytest.fixture(scope="module")
def smooth():
    """A small untrained generator: its clips depend on every word, and smoothly"""
    return tiny_generator(spread=.05)


# ---- shaped by measuring

def test_a_vlm_that_reads_darkness_is_found_out(wan, captions):
    concept = shape_concept(Models(wan, dark_oracle()), PACE, captions, SMALL)
    for text in captions:
        parts = concept.parts(text)
        # the darkest floor first, alone but for what is nearly as dark
        assert parts[0].target == "leafy" and parts[0].amount == 1.
        assert {part.target for part in parts} <= {"leafy"}
    assert concept.model.explained > .9
    base, offsets = wan.encode_prompt(captions[:4]), torch.stack(
        [concept.offset(wan, text) for text in captions[:4]]
    )
    with torch.no_grad():
        video = wan.decode(
            wan.sample(base.with_embeds(base.embeds + offsets), seeds=[0, 1, 2, 3])
        ).clamp(0, 1)
    assert [reading["floor"] for reading in read_video(video)].count("leafy") >= 3


def test_what_no_group_of_words_holds_is_not_found(wan, captions):
    model = measure_answers(Models(wan, dark_oracle()), PACE, captions, SMALL, WITHOUT_FLOOR)
    assert model.explained < .5 and not set(model.effects) & set(SLOTS["floor"])
    assert not any(
        part.target in SLOTS["floor"] for part in ShapedConcept(PACE, model).parts(captions[0])
    )


def test_what_two_vlms_share_is_left_out(wan, captions):
    both = measure_answers(
        Models(wan, dark_oracle(40.)), PACE, captions, SMALL, against=dark_oracle(20.),
    )
    alone = measure_answers(Models(wan, dark_oracle(20.)), PACE, captions, SMALL)
    assert both.effects.keys() == alone.effects.keys()
    for word, effect in alone.effects.items():
        assert both.effects[word] == pytest.approx(effect, abs=1e-3)


def test_weight_zero_is_the_papers_concept(wan, captions):
    model = measure_answers(Models(wan, dark_oracle()), PACE, captions, SMALL)
    paper = Concept(
        PACE,
        torch.randn(
            wan.config.prompt_tokens, wan.text_dim, generator=torch.Generator().manual_seed(0),
        ),
        ConceptConfig(placement="sequence"),
    )
    for text in captions[:3]:
        assert torch.equal(
            ShapedConcept(PACE, model, ShapingConfig(weight=0.), paper).offset(wan, text),
            paper.offset(wan, text),
        )
        assert torch.equal(
            ShapedConcept(PACE, model, ShapingConfig(weight=0.)).offset(wan, text),
            TargetCaption(PACE).offset(wan, text),
        )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(.1, 50.), shift=st.floats(-20., 20.))
def test_effects_follow_the_unit_and_not_the_zero_of_gaps(seed, factor, shift):
    generator = torch.Generator().manual_seed(seed)
    texts = balanced_captions(
        [caption(scene) for scene in sample_scenes(5, seed % 1000)], WORD_GROUPS, 40, seed,
    )
    gaps = torch.tensor(
        [4. * ("snowy" in text) - 3. * ("red" in text) for text in texts]
    ) + .2 * torch.randn(40, generator=generator)
    model, other = fit_answers(texts, gaps.double(), PACE), fit_answers(
        texts, (factor * gaps + shift).double(), PACE,
    )
    assert model.effects.keys() == other.effects.keys() and other.explained == pytest.approx(
        model.explained, abs=1e-3,
    )
    for word, effect in model.effects.items():
        assert other.effects[word] == pytest.approx(factor * effect, abs=1e-3 * factor + 1e-4)
    order = torch.randperm(40, generator=generator)
    mixed = fit_answers([texts[k] for k in order], gaps[order].double(), PACE)
    for word, effect in model.effects.items():
        assert mixed.effects[word] == pytest.approx(effect, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-9., 9.), min_size=8, max_size=8), least=st.floats(0., 1.),
    scene=st.integers(0, 10_000),
)
def test_parts_are_ordered_and_lead_upwards(values, least, scene):
    effects = dict(zip((*SLOTS["floor"], *SLOTS["pace"], *SLOTS["size"]), values))
    text = caption(sample_scenes(1, scene)[0])
    concept = ShapedConcept(
        PACE, AnswerModel(PACE, WORD_GROUPS, effects, 0., 1., 48), ShapingConfig(least=least),
    )
    parts = concept.parts(text)
    assert [part.gain for part in parts] == sorted((part.gain for part in parts), reverse=True)
    assert all(least <= part.amount <= 1 and part.gain > 0 for part in parts)
    if parts: assert parts[0].amount == 1.
    for part in parts:
        group = next(group for group in WORD_GROUPS if part.target in group)
        assert part.source == word_of(text, group) and effects[part.target] == max(
            effects[word] for word in group
        )
        text = with_word(text, group, part.target)
    if least == 0: assert concept.parts(text) == []


# ---- by gradient

@pytest.mark.parametrize(
    "through, ahead", [("reencoded", 1.), ("reencoded", .5), ("phi", 1.), ("phi", .5)],
)
def test_the_gradient_is_the_slope(wan, captions, states, phi, through, ahead):
    base, samples = states
    batch, models = samples.take(torch.tensor([1, 3, 8])), Models(wan, dark_oracle(), phi)
    rows, texts = base.index(batch.clip), [captions[k] for k in batch.clip.tolist()]
    leafy = wan.encode_prompt([captions[0].replace("snowy", "leafy")])
    direction = leafy.embeds[0] - base.embeds[0]
    def gap(amount):
        return denoised_gaps(
            models, batch, rows.with_embeds(rows.embeds + amount * direction), PACE, texts,
            through, ahead=ahead,
        ).gap.sum()
    amount = torch.tensor(.3, requires_grad=True)
    gap(amount).backward()
    # the slope by differences; Phi's own look at the prompt is left out of the gradient, so it must
    # be held still there
    def unread(step):
        with torch.no_grad():
            if through == "reencoded": return gap(torch.tensor(.3 + step))
            still = rows.with_embeds(rows.embeds + .3 * direction)
            velocity = wan.velocity(
                batch.latents, rows.with_embeds(rows.embeds + (.3 + step) * direction), batch.t,
            )
            wide = ahead * (1 - batch.t)
            return latent_gap(
                models, batch.latents + wide.view(-1, 1, 1, 1, 1) * velocity, still, PACE, texts,
                batch.t + wide,
            ).sum()
    slope = (unread(.01) - unread(-.01)) / .02
    assert amount.grad.abs() > 1e-4
    assert_close(amount.grad, slope, rtol=.05, atol=1e-3)


@pytest.mark.parametrize("through", ["reencoded", "phi"])
def test_learning_changes_no_model(wan, captions, phi, through):
    def digests(): return [tensor_digest(model.state_dict()) for model in (wan, phi)]
    before = digests()
    concept = learn_by_gradient(
        Models(wan, dark_oracle(), phi), PACE, captions,
        GradientConfig(steps=2, batch_size=2, n_clips=2, sample_steps=2, through=through),
    )
    assert digests() == before and not concept.vectors.requires_grad
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for model in (wan, phi)
        for parameter in model.parameters()
    )


def test_at_weight_zero_the_vlm_is_not_even_asked(wan, captions):
    class Silent(PixelOracle):
        def embed(self, video): raise AssertionError("asked")
    config = GradientConfig(weight=0., steps=2, batch_size=2, n_clips=2, sample_steps=2)
    concept = learn_by_gradient(Models(wan, Silent(PACE, [1., 1., 1.])), PACE, captions, config)
    assert concept.meta["cost"]["vlm_evaluations"] == 0
    assert torch.equal(
        concept.vectors,
        learn_by_gradient(Models(wan, dark_oracle()), PACE, captions, config).vectors,
    )


def test_a_smooth_generator_is_led(smooth, captions):
    # its clips hardly differ from grey, so that a large gain is needed for nats
    vlm = dark_oracle(400.)
    config = GradientConfig(
        weight=1., steps=12, batch_size=6, n_clips=4, sample_steps=4, reach=40., stay=0.,
    )
    concept, base, noise = learn_by_gradient(
        Models(smooth, vlm), PACE, captions[:4], config,
    ), smooth.encode_prompt(captions[4:8]), smooth.noise([70, 71, 72, 73])
    def gap(embeds):
        with torch.no_grad():
            return latent_gap(
                Models(smooth, vlm), smooth.sample(base.with_embeds(embeds), noise=noise, steps=4),
                base, PACE, captions[4:8],
            )
    assert (gap(base.embeds + concept.vectors) > gap(base.embeds)).all()
    assert concept.meta["losses"][-1]["answer"] < concept.meta["losses"][0][
        "answer"
    ] or concept.meta["losses"][-1]["gap"] > concept.meta["losses"][0]["gap"]


def test_the_shipped_generator_decides_at_once(wan, captions):
    """Why gradients at the source say little: even to a VLM that cannot saturate, a clip stays on
    its floor until the words are half exchanged"""
    texts = captions[:2]
    base = wan.encode_prompt(texts)
    offsets = torch.stack(
        [wan.encode_prompt([with_word(text, SLOTS["floor"], "leafy")]).embeds[0] for text in texts]
    )[:, None] - base.embeds[:, None]
    def gap(at):
        amounts = torch.full((2, 1), at, requires_grad=True)
        gaps = latent_gap(
            Models(wan, dark_oracle()), *path_latents(wan, base, offsets, amounts, [1, 2]), PACE,
            texts,
        )
        return gaps.detach(), torch.autograd.grad(gaps.sum(), amounts)[0][:, 0]
    (start, slope), (middle, _), (end, _) = gap(0.), gap(.3), gap(1.)
    assert (end - start > 5).all() and (slope.abs() < .1 * (end - start)).all() and (
        (middle - start).abs() < .1 * (end - start)
    ).all()


def test_against_subtracts_before_the_loss(wan, captions, states):
    base, samples = states
    batch = samples.take(torch.tensor([0, 4]))
    asked = (
        Models(wan, dark_oracle(30.)), batch, base.index(batch.clip), PACE,
        [captions[k] for k in batch.clip.tolist()],
    )
    less = denoised_gaps(Models(wan, dark_oracle(12.)), *asked[1:]).gap
    assert_close(
        denoised_gaps(*asked, against=dark_oracle(12.)).gap, denoised_gaps(*asked).gap - less,
    )
    loss = gradient_loss(
        Models(wan, dark_oracle(30.)), batch, base.index(batch.clip),
        torch.zeros_like(base.embeds[0]), PACE, asked[-1], GradientConfig(weight=1.),
        dark_oracle(12.),
    )
    assert_close(loss.gap, (denoised_gaps(*asked).gap - less).mean())


def test_phi_cannot_be_told_the_answer(wan, captions, states, phi):
    base, samples = states
    end = PartialSamples(*(value[:3] for value in samples))._replace(t=torch.ones(3))
    vector = torch.zeros_like(base.embeds[0]).requires_grad_()
    moved = base.with_embeds(base.embeds + vector)
    denoised_gaps(
        Models(wan, dark_oracle(), phi), end, moved, PACE, captions[:3], "phi",
    ).gap.sum().backward()
    # at the end of the way a vector changes no clip any more, only what Phi reads
    assert vector.grad.abs().max() == 0


def test_guidance_follows_what_is_not_saturated(wan, captions):
    bent = guided_clips(
        Models(wan, dark_oracle()), PACE, captions[:2], wan.noise([3, 4]), (0., .5, 1.), share=.4,
        steps=6,
    )
    base = wan.encode_prompt(captions[:2])
    gaps = torch.stack(
        [
            latent_gap(Models(wan, dark_oracle()), bent.latents[:, k], base, PACE, captions[:2])
            for k in range(3)
        ],
        1,
    )
    assert (gaps.diff(dim=1) > 0).all()
    assert_close(
        bent.latents[:, 0], wan.sample(base, noise=wan.noise([3, 4]), steps=6), rtol=1e-3,
        atol=1e-3,
    )


def test_shares_of_words_add_up_to_the_change(smooth, captions):
    config, vlm = WordGradientConfig(n_clips=5, points=24, batch_size=3, seed=2), dark_oracle(400.)
    found = word_gradients(Models(smooth, vlm), PACE, captions, config)
    base = smooth.encode_prompt(found.source)
    offsets = torch.stack(
        [
            smooth.encode_prompt(
                [with_word(a, group, word_of(b, group)) for a, b in zip(found.source, found.target)]
            ).embeds - base.embeds
            for group in WORD_GROUPS
        ],
        1,
    )
    asked = [with_word(text, SLOTS["pace"], "slowly") for text in found.source]
    with torch.no_grad():
        start, end = (
            latent_gap(
                Models(smooth, vlm),
                *path_latents(
                    smooth, base, offsets, torch.full((5, 8), float(at)),
                    [90_000 + k for k in range(5)],
                ),
                PACE, asked,
            )
            for at in (0, 1)
        )
    change = end - start
    assert (
        found.shares.sum(1) - change
    ).abs().max() < .05 * change.abs().max() and change.abs().max() > 1e-2


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-9., 9.), min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_effects_are_what_the_shares_came_from(values, seed):
    texts = [caption(scene) for scene in sample_scenes(4, seed)]
    source, target = (balanced_captions(texts, WORD_GROUPS, 24, seed + k) for k in (0, 1))
    known = dict(zip(SLOTS["floor"], values))
    shares = torch.tensor(
        [
            [
                known.get(word_of(b, group), 0.) - known.get(word_of(a, group), 0.)
                for group in WORD_GROUPS
            ]
            for a, b in zip(source, target)
        ]
    )
    found = word_effects(source, target, shares)
    for word, effect in known.items():
        assert found[word] == pytest.approx(effect - sum(values) / 4, abs=1e-3)
