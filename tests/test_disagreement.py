"""Whose word a coupling answers with, on models that can be worked out by hand; prompts that cannot
be trusted, in training; and networks that see the clip to come"""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from transporter_nb.core.base import checkpoint_path, seeded_generator
from transporter_nb.coupling.network import CouplingConfig, CouplingNetwork
from transporter_nb.coupling.training import (
    CouplingBatch, CouplingTraining, accumulate_gradients, shuffle_tokens, train_coupling,
    vary_prompts,
)
from transporter_nb.evaluate.disagreement import (
    Shares, disagreement, disagreement_table, questions_between, ways_to_look, whose_words,
)
from transporter_nb.models.generators.base import PromptCondition, VideoGenerator, predict_data
from transporter_nb.models.testing import LinearGenerator, tiny_vlm
from transporter_nb.models.view import Models
from transporter_nb.models.vlms.base import VideoLanguageModel, word_tokenizer

COLOURS = ("red", "green", "blue")


class Colours(VideoGenerator):
    "A clip is one of three colours, one channel each; the velocity leads to the prompt's colour"
    name, text_dim, latent_channels, default_steps, default_guidance = "colours", 3, 3, 2, 1.0
    config = SimpleNamespace(frames=1)

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode_prompt(self, prompts):
        embeds, mask = torch.zeros(len(prompts), 4, 3), torch.zeros(len(prompts), 4).bool()
        for row, prompt in enumerate(prompts):
            for k, word in enumerate(prompt.split()):
                mask[row, k] = True
                if word in COLOURS: embeds[row, k, COLOURS.index(word)] = 1.
        return PromptCondition(embeds, mask)

    def token_positions(self, prompt, start_char, end_char): raise NotImplementedError

    def velocity(self, latents, condition, t):
        goal = condition.expand_to(len(latents)).embeds.sum(1)[:, :, None, None, None]
        return (goal - latents) / max(1 - float(torch.as_tensor(t).max()), 1e-6)

    def encode(self, video): return video.transpose(1, 2)
    def decode(self, latents): return latents.transpose(1, 2)
    def latent_shape(self, n): return (n, 3, 1, 1, 1)
    def times(self, steps): return torch.linspace(0, 1, steps + 1)


class Reader(VideoLanguageModel):
    "Says the colour of the strongest channel"
    name, n_tokens, vlm_dim = "reader", 1, 3

    def __init__(self):
        super().__init__()
        self.words = ["a", "ball", "balls", *COLOURS]
        self.tokenizer, self.end_id = word_tokenizer(self.words, ["<pad>", "<unk>"]), 0
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def embed(self, video): return video[:, :1, :, 0, 0]
    def prompt_ids(self, question, prefix=""): return self.word_ids(prefix) if prefix else [0]

    def text_logits(self, vlm_embeddings, text):
        logits = torch.full((len(vlm_embeddings), 8), -30.)
        logits[:, 5:] = vlm_embeddings[:, 0]
        return logits[:, None].expand(-1, text.token_ids.shape[1], -1)


class Believer(nn.Module):
    "A coupling that reads the prompt, and nothing else"
    config = SimpleNamespace(sees="state")

    def forward(self, latents, embeds, mask, reencoded, t=None, coming=None):
        return SimpleNamespace(transported=embeds.sum(1, keepdim=True))


class Sees(Believer):
    "A coupling that looks at the clip to come alone"
    config = SimpleNamespace(sees="coming")

    def forward(self, latents, embeds, mask, reencoded, t=None, coming=None):
        decoded = coming.transpose(1, 2)[:, :1, :, 0, 0].clamp(0, 1)
        assert torch.equal(reencoded, decoded)
        return SimpleNamespace(transported=reencoded)


CAPTIONS = ["a red ball", "a green ball", "a blue ball"]
CLIPS = torch.eye(3)[:, None, :, None, None]


def test_by_hand_every_row_says_whose_word_it_is():
    found = disagreement(Models(Colours(), Reader(), Believer()), CLIPS, CAPTIONS, 1., seed=0)
    of_clip, of_prompt = Shares(1., 0., 0., 3), Shares(0., 1., 0., 3)
    assert found["prompt words"] == of_prompt and found["Phi"] == of_prompt
    assert found["the clip itself"] == of_clip and found["decode and re-encode"] == of_clip
    # early, the generator is already on its way to the prompt's colour
    early = disagreement(Models(Colours(), Reader(), Sees()), CLIPS, CAPTIONS, .3, seed=0)
    assert early["the clip to come"] == of_prompt
    assert early["Phi"] == early["the clip to come, no prompt"]
    assert early["the clip itself"] == of_clip
    assert early["the clip to come, no prompt"].prompt < 1 # of no colour
    assert sum(early["decode and re-encode"][:3]) == pytest.approx(1)
    table = disagreement_table({1.: found, .3: early})
    assert "t = 0.3: prompt" in table and "Phi" in table


def test_batches_change_nothing_and_phi_may_be_left_out():
    inputs = Models(Colours(), Reader()), CLIPS, CAPTIONS, .6, 3
    whole = disagreement(*inputs)
    assert "Phi" not in whole and whole == disagreement(*inputs, batch_size=2)


def test_questions_are_the_words_that_differ_but_not_in_number():
    asked = questions_between(Reader(), ["a red ball", "red balls"], ["a blue ball", "red ball"])
    assert [(question.clip, question.asked.turn.prefix) for question in asked] == [(0, "a")]
    assert (asked[0].asked.pieces, asked[0].n_own) == ([[5], [7]], 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 1), min_size=1, max_size=20))
def test_shares_add_up(answers):
    asked = questions_between(Reader(), ["a red ball"], ["a blue ball"]) * len(answers)
    found = whose_words(torch.tensor(answers), asked)
    assert sum(found[:3]) == pytest.approx(1) and min(found[:3]) > -1e-9
    assert found.clip == pytest.approx(answers.count(0) / len(answers))


def test_errors_say_what_and_how():
    models = Models(Colours(), Reader())
    with pytest.raises(ValueError, match="two clips or more"):
        disagreement(models, CLIPS[:1], CAPTIONS[:1], .3, 0)
    with pytest.raises(ValueError, match="t = 1.5"):
        disagreement(models, CLIPS, CAPTIONS, 1.5, 0)
    with pytest.raises(ValueError, match="leaves nothing to ask"):
        disagreement(models, CLIPS, ["a red ball"] * 3, .3, 0)


def batch_of(n, **more):
    draws = seeded_generator(n)
    def normal(*shape): return torch.randn(n, *shape, generator=draws)
    mask = torch.arange(7) < torch.tensor([3, 5, 7, 4, 6, 2][:n])[:, None]
    text = normal(7, 5) * mask[..., None]
    inputs = normal(6, 3, 2, 4), text, mask, normal(9, 8), normal(9, 8)
    return CouplingBatch(*inputs, torch.full((n,), .4), **more)


SMALL = CouplingConfig.mini(
    latent_shape=(6, 3, 2, 4), text_dim=5, prompt_tokens=7, vlm_tokens=9, vlm_dim=8,
    projection_width=16, projection_depth=1, projection_hidden=12, structure_width=16,
    structure_depth=1, n_projections=10,
)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, .99), st.integers(0, 1000))
def test_a_varied_prompt_is_a_prompt_of_the_batch(drop, one, two, seed):
    shares = dict(text_dropout=drop, text_exchange=one * two, text_shuffle=(1 - one) * two)
    batch = batch_of(6)
    embeds, mask = vary_prompts(batch, CouplingTraining(**shares), seeded_generator(seed))
    own = {tuple(sorted(row[rows].sum(1).tolist())) for row, rows in
           zip(batch.condition_embeds, batch.condition_mask)}
    for row, rows in zip(embeds, mask):
        assert not rows.any() or tuple(sorted(row[rows].sum(1).tolist())) in own
    again = vary_prompts(batch, CouplingTraining(**shares), seeded_generator(seed))
    assert torch.equal(again[0], embeds) and torch.equal(again[1], mask)


def test_the_default_draws_nothing_new():
    batch, plain = batch_of(6), CouplingTraining()
    generator, before = seeded_generator(4), seeded_generator(4)
    embeds, mask = vary_prompts(batch, plain, generator)
    keep = torch.rand(6, generator=before) >= .3
    assert torch.equal(embeds, batch.condition_embeds)
    assert torch.equal(mask, batch.condition_mask & keep[:, None])
    assert torch.equal(generator.get_state(), before.get_state())


def test_padding_stays_where_it_is():
    batch = batch_of(6)
    mixed = shuffle_tokens(batch.condition_embeds, batch.condition_mask, seeded_generator(0))
    assert (mixed[~batch.condition_mask] == 0).all()
    assert (mixed[batch.condition_mask] != 0).all()


def test_training_with_exchanged_prompts_learns_to_leave_them():
    "The target is in the latents; a prompt of one's own clip holds it too"
    def draw(generator):
        latents = torch.randn(16, 6, 3, 2, 4, generator=generator)
        target = latents.mean((2, 3, 4))[:, None, :5].expand(-1, 9, -1)
        target = torch.cat([target, torch.zeros(16, 9, 3)], -1) * 4
        text = target[:, :7, :5] + .01
        inputs = latents, text, torch.ones(16, 7).bool(), torch.zeros(16, 9, 8), target
        return CouplingBatch(*inputs, torch.ones(16))
    errors = {}
    for share in (0., .5):
        torch.manual_seed(0)
        network = CouplingNetwork(SMALL)
        plan = CouplingTraining.mini(
            steps=150, warmup_steps=10, text_dropout=0., text_exchange=share, ema_decay=.9)
        train_coupling(network, draw, plan)
        fresh = draw(seeded_generator(99))
        wrong = fresh.condition_embeds.roll(1, 0)
        with torch.no_grad():
            found = network(fresh.latents, wrong, fresh.condition_mask, fresh.reencoded, fresh.t)
        errors[share] = (found.projected - fresh.target_embeddings).square().mean().item()
    assert errors[.5] < .8 * errors[0.]


@pytest.mark.parametrize("sees", ["state", "coming", "both"])
def test_networks_that_see_the_clip_to_come(sees, tmp_path):
    torch.manual_seed(0)
    network = CouplingNetwork(CouplingConfig(**{**vars(SMALL), "sees": sees}))
    batch = batch_of(4)
    ahead = batch._replace(coming=batch.latents + 1)
    record = accumulate_gradients(
        network, lambda generator: ahead, CouplingTraining.mini(), seeded_generator(0))
    assert record["loss"] > 0 and network.projection.embed_latents.weight.grad.abs().max() > 0
    file = network.save_pretrained(tmp_path / "phi.safetensors", made_for={"vlm": "v"})
    again = CouplingNetwork.from_pretrained(file)
    assert again.config.sees == sees
    at_end = again(*batch[:4], 1.).projected
    assert torch.equal(at_end, again(*batch[:4], 1., batch.latents).projected)
    if sees == "state":
        assert torch.equal(again(*batch[:4], .4).projected, again(*batch[:4], .4, ahead.coming)[0])
        return
    with pytest.raises(ValueError, match="Pass coming=predict_data"): again(*batch[:4], .4)
    moved = again(*batch[:4], .4, ahead.coming).projected
    assert (moved - again(*batch[:4], .4, batch.latents).projected).abs().max() > 1e-4


def test_shipped_couplings_are_the_papers_form():
    coupling = CouplingNetwork.from_pretrained(checkpoint_path("coupling_phi4"))
    assert coupling.config.sees == "state"


def test_all_looks_share_state_and_prompt():
    looks = ways_to_look(
        Models(Colours(), Reader()), CLIPS.transpose(1, 2),
        Colours().encode_prompt(CAPTIONS[::-1]), .5)
    assert torch.equal(looks["decode and re-encode"][:, 0], torch.eye(3))
    torch.testing.assert_close(looks["the clip to come"][:, 0], torch.eye(3).flip(0))


@pytest.mark.parametrize("sees", ["coming", "both"])
def test_a_view_gives_a_coupling_the_clip_to_come(sees):
    "On the way a view asks the generator for it, as in training"
    torch.manual_seed(0)
    generator, vlm = LinearGenerator(), tiny_vlm()
    sizes = dict(latent_shape=generator.shape, text_dim=3, vlm_tokens=vlm.n_tokens, vlm_dim=12)
    network = CouplingNetwork(CouplingConfig(**{**vars(SMALL), **sizes, "sees": sees}))
    models = Models(generator, vlm, network.eval().requires_grad_(False))
    condition = generator.encode_prompt(["a red ball", "a blue ball"])
    states, t = generator.noise([0, 1]), torch.tensor([.4, .8])
    found = models.view(states, condition, t, batch_size=1)
    alone = generator.velocity(states, generator.null_condition(2), t)
    coming = predict_data(states, alone, t)
    seen = vlm.embed(models.decode(coming))
    wanted = network(states, condition.embeds, condition.mask, seen, t, coming).transported
    torch.testing.assert_close(found.phi, wanted)
    reencoded = vlm.embed(models.decode(states))
    torch.testing.assert_close(found.reencoded, reencoded) # of the state, as ever
    finished = models.view(states, condition) # nothing is to come
    at_end = network(states, condition.embeds, condition.mask, reencoded, 1.).transported
    torch.testing.assert_close(finished.phi, at_end)
    moving = states.clone().requires_grad_()
    models.view(moving, condition, t).phi.square().mean().backward()
    assert moving.grad.abs().max() > 0


def test_the_names_of_diffusers():
    models = Models(Colours(), Reader())
    own = disagreement(models, CLIPS, CAPTIONS, .3, 0, guidance=2.)
    assert disagreement(models, CLIPS, CAPTIONS, .3, 0, guidance_scale=2.) == own
    with pytest.raises(ValueError, match="got 2.0 and 3.0. Give one of them"):
        disagreement(models, CLIPS, CAPTIONS, .3, 0, 3., guidance_scale=2.)
