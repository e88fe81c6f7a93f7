"""The prompts of published models: dates of the clip, the processors' text, token for token"""
import pytest
import torch
from make_processor_fixtures import PROMPTS, small_tokenizer

from transporter_nb.models.registry import VLMS, find_adapter
from transporter_nb.models.testing import tiny_settings, tiny_vlm
from transporter_nb.models.vlms.preprocessing import FRAMES_TEXT, even_frames, stepped_frames

ASKED = "what colour is it?"
CLIPS = [(61, 16., 5), (61, 16., 32), (9, 2., 4), (180, 24., 8), (600, 29.97, 3)]


def published(name, n_frames=5):
    "An adapter with a tokenizer of single characters, as if it came from the hub"
    sizes = {"vision_size": 16} if name in ("qwen25vl", "videollama3") else {}
    adapter = find_adapter("vlm", name, VLMS)
    words = ["two", "large", *(f"word{k}" for k in range(250))] # more tokens than characters
    blank = tiny_vlm(name, words=words, **sizes)
    settings = tiny_settings(**sizes, n_frames=n_frames, hub_id="tiny/vlm")
    marks = [adapter.hub_mark(k) if adapter.marked else "" for k in range(1, n_frames + 1)]
    tokenizer = small_tokenizer()
    for token in adapter.special_tokens:
        if tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id:
            tokenizer.add_tokens([token], special_tokens=True)
    return adapter(settings, blank.model, tokenizer, marks).freeze()


def whole_prompt(vlm): return vlm.preamble.tolist() + vlm.prompt_ids(ASKED)


@pytest.mark.parametrize("frames, rate, n_frames", CLIPS)
def test_videollama3_dates_its_frames_by_the_clip(frames, rate, n_frames):
    vlm = published("videollama3", n_frames).set_clock(frames, rate)
    seconds = [k / rate for k in stepped_frames(frames, n_frames)]
    before, _, after = PROMPTS["videollama3"]
    text = FRAMES_TEXT["videollama3"].text(vlm.tokens_per_frame, seconds)
    expected = before + text + "\n" + after # the line break is the adapter's, see there
    assert whole_prompt(vlm) == vlm.tokenizer(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize("frames, rate, n_frames", CLIPS)
def test_smolvlm_says_how_long_the_clip_is(frames, rate, n_frames):
    if n_frames > frames: pytest.skip("more frames than the clip has")
    vlm = published("smolvlm", n_frames).set_clock(frames, rate)
    seconds = [k / rate for k in even_frames(frames, n_frames)]
    before, _, after = PROMPTS["smolvlm"]
    after = after.replace("<|im_end|>", "<end_of_utterance>") # SmolVLM2's own end of a turn
    text = FRAMES_TEXT["smolvlm"].text(vlm.tokens_per_frame, seconds, frames / rate)
    assert "You are provided the following series of" in text
    assert whole_prompt(vlm) == vlm.tokenizer(before + text + after,
                                              add_special_tokens=False).input_ids


@pytest.mark.parametrize("frames, rate", [(61, 16.), (180, 24.)])
def test_qwen_has_a_system_turn_and_the_clips_seconds(frames, rate):
    vlm = published("qwen25vl").set_clock(frames, rate)
    before, _, after = PROMPTS["qwen2_5_vl"]
    text = FRAMES_TEXT["qwen2_5_vl"].text(vlm.tokens_per_frame, [0.] * 5)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = vlm.tokenizer(system + before + text + after, add_special_tokens=False).input_ids
    assert whole_prompt(vlm) == expected
    kinds = 2 * (torch.tensor(expected) == vlm.tokenizer.convert_tokens_to_ids(vlm.image_token))
    step = 2 / (10 / frames * rate) # two frames a patch; ten are taken: the processor's formula
    own, _ = vlm.model.model.get_rope_index(
        torch.tensor(expected)[None], kinds.int()[None], video_grid_thw=vlm.grid(1),
        second_per_grid_ts=[step])
    text_positions = torch.arange(len(expected))[None]
    assert vlm.rope_positions(text_positions)[:, 0].equal(own[:, 0])


@pytest.mark.parametrize("name", ["phi4", "gemma3", "videollama3", "qwen25vl", "smolvlm"])
def test_a_clip_of_another_length_is_dated_anew(name):
    vlm = published(name).set_clock(20, 4.)
    before = whole_prompt(vlm)
    tokens = vlm.embed(torch.rand(1, 40, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (1, vlm.n_tokens, vlm.vlm_dim)
    assert (vlm.clock == (40, 4.)) == (name not in ("phi4", "gemma3")) # these have no dates
    assert (whole_prompt(vlm) != before) == (name in ("videollama3", "smolvlm"))
    log_probs = vlm.next_token_log_probs(tokens, ASKED)
    assert torch.allclose(log_probs.logsumexp(-1), torch.zeros(1), atol=1e-4)


@pytest.mark.parametrize("name", ["phi4", "smolvlm", "qwen25vl"])
def test_a_miniature_keeps_its_marks(name):
    vlm = tiny_vlm(name, **({"vision_size": 16} if name == "qwen25vl" else {}))
    before = vlm.preamble.clone()
    assert vlm.set_clock(9, 2.).clock is None and vlm.preamble.equal(before)


def test_qwen_takes_pairs_of_frames_as_its_processor_does():
    vlm = published("qwen25vl", 4)
    assert vlm.shown_frames(61) == stepped_frames(61, 8, depth=2)
    assert vlm.shown_frames(7) == list(range(7)) # the last one is shown twice
