"""Published models in miniature: the real layout, names, revisions and kinds of tokenizer, with
random weights a few numbers wide"""
import json
import shutil

from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transporter_nb.core.hub import SOURCES
from transporter_nb.models.generators.wan import (
    SPECIAL_TOKENS, WAN_MEAN, WAN_STD, WanConfig, WanGenerator, WanTextConfig,
    WanTransformerConfig, WanVAEConfig,
)
from transporter_nb.models.registry import VLMS, find_adapter
from transporter_nb.models.testing import save_snapshot, tiny_settings
from transporter_nb.models.vlms.base import DESCRIBE
from transporter_nb.world.contrasts import PAPER_CONTRASTS

# text that the tokenizers are trained on; words of no caption are cut into pieces
TEXTS = [DESCRIBE, "two large red cones slide left slowly over a blue floor of stone",
         *(entry.caption for entry in PAPER_CONTRASTS.values()),
         *(entry.pair.apply(entry.caption) for entry in PAPER_CONTRASTS.values())]
READS_TEXT = ("attn2.to_v", "attn2.to_out", "text_embedder") # of Wan's transformer
RED = "A close up shot of a red bowling ball hitting the pins in a bowling alley"
# small clips and few steps, as a reader asks for them
WORDS = "clip_size=5x32x32, n_frames=2, steps=2, concept_steps=2, concept_seeds=2"
PIECES = 1000 # of a VLM's vocabulary, the 256 bytes included
IMAGE_PROCESSORS = { # class of the family's published processor
    "phi4": "Phi4MultimodalImageProcessor", "gemma3": "Gemma3ImageProcessor",
    "videollama3": "VideoLlama3ImageProcessor", "qwen25vl": "Qwen2VLImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
}


def byte_pieces(special):
    "A tokenizer of bytes and pieces, as all five VLMs have; special tokens first"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], additional_special_tokens=list(special[2:]))


def marked_pieces():
    "A tokenizer with marks of spaces and an end token, as umT5 has"
    pad, end, unknown = SPECIAL_TOKENS
    core = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=[*SPECIAL_TOKENS, *letters], show_progress=False))
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, core.token_to_id(end))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, unk_token=unknown)


def wan(two):
    "Wan2.2 with two experts or Wan2.1 with one: the released form of every part"
    tokenizer = marked_pieces()
    config = WanConfig(
        vae=WanVAEConfig(
            base_dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, is_residual=False,
            temperal_downsample=(False, True, True), in_channels=3, out_channels=3,
            patch_size=None, scale_factor_temporal=4, scale_factor_spatial=8,
            latents_mean=WAN_MEAN, latents_std=WAN_STD),
        transformer=WanTransformerConfig(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1,
            rope_max_seq_len=64),
        text=WanTextConfig(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1,
                           num_heads=2),
        frames=5, height=32, width=32, prompt_tokens=512,
        boundary_ratio=.875 if two else None, guidance=(4., 3.) if two else 5.)
    made = WanGenerator.new(config, tokenizer, seed=two).freeze()
    for expert in filter(None, (made.transformer, made.transformer_2)):
        for name, weights in expert.named_parameters():
            if "norm" not in name: weights.mul_(3.)
            if "attn2.norm_k" in name: weights.mul_(10.) # one of 512 tokens makes a difference
            if any(part in name for part in READS_TEXT): weights.mul_(16.)
    return made


def vlm(name):
    "A VLM of a family in the form of its release; Phi-4 with its vision adapter beside it"
    adapter = find_adapter("vlm", name, VLMS)
    # Qwen and VideoLLaMA 3 do not state an image size: with such patches a frame is four tokens
    patch = 84 if name in ("qwen25vl", "videollama3") else 8
    settings = tiny_settings(
        n_frames=2, image_size=4 * patch if patch == 84 else 32, patch_size=patch, hidden_size=32,
        n_layers=2, vision_size=32)
    words = [f"w{k}" for k in range(PIECES - len(adapter.special_tokens))]
    made = adapter.new(settings, words, seed=1).freeze()
    made.tokenizer = byte_pieces(adapter.special_tokens)
    for name, weights in made.model.named_parameters(): # answers follow the clip
        if name.endswith(("o_proj.weight", "down_proj.weight")): weights.mul_(3.)
    return made


def save_vlm(name, folder):
    "Weights in shards, tokenizer, processor, chat template"
    made = vlm(name)
    save_snapshot(made, folder, "20KB")
    size = {"height": made.settings.image_size, "width": made.settings.image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": IMAGE_PROCESSORS[name], "size": size, "do_rescale": True}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Processor"}))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    if name != "phi4": return folder
    lora = LoraConfig(r=2, target_modules=r"model\.layers.*o_proj", init_lora_weights=False)
    made.model.add_adapter(lora, "vision")
    made.model.save_pretrained(folder / "vision-lora")
    return folder


def put(cache, folder, repo, revision):
    "Move a snapshot to where `hf download` leaves it"
    place, commit = cache / f"models--{repo.replace('/', '--')}", revision
    if len(revision) != 40: # a branch points to a commit
        commit = "1" * 40
        ref = place / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    shutil.move(folder, place / "snapshots" / commit)
    return place / "snapshots" / commit


def publish(cache, aside):
    "Every release in a hub cache; the folders by name"
    made = {}
    for name in ("wan", "wan-1.3b"):
        folder = save_snapshot(wan(name == "wan"), aside / name, "20KB")
        made[name] = put(cache, folder, SOURCES[name].repo, SOURCES[name].revision)
    for name in VLMS:
        paper = find_adapter("vlm", name, VLMS).paper
        folder = save_vlm(name, aside / name)
        made[name] = put(cache, folder, paper.hub_id, paper.revision)
    return made
