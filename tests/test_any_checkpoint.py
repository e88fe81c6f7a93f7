"""Any checkpoint by its place, and every fault of a folder named before weights are read"""
import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from diffusers import ModelMixin
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from transformers import PreTrainedModel

from transporter_nb.app import doctor
from transporter_nb.core import hub
from transporter_nb.core.hub import SOURCES, HubSource, LoadOptions, cached_folder
from transporter_nb.explain import plan as planning
from transporter_nb.explain.budget import kept_bytes
from transporter_nb.explain.stages import blank_vlm, stage_cost
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.cache import model_digests
from transporter_nb.models.pairing import COUPLING_PROBES, made_for
from transporter_nb.models.registry import (
    MODEL_TYPES, VLMS, find_adapter, find_model, load_generator, load_vlm,
)
from transporter_nb.models.testing import save_snapshot, tiny_generator, tiny_vlm
from transporter_nb.models.vlms.base import DESCRIBE, word_tokenizer, world_words

RED, CHANGE = "one large red ball slides left slowly over a stone floor", "red -> blue"
EXACT = LoadOptions(dtype="float32")
CLIP = (9, 32, 32)
WORDS = [*world_words(), "frame", *(f"{k}:" for k in range(1, 9))]


def small(name, **changes):
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, n_layers=2, vision_size=32)
    return tiny_vlm(name, words=WORDS, **(sizes | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A snapshot of every VLM, in shards, and of one Wan of each kind"""
    made = {name: save_snapshot(small(name), tmp_path_factory.mktemp(name)) for name in VLMS}
    for name, boundary in (("one", None), ("two", .875)):
        wan = tiny_generator(n_layers=2, boundary_ratio=boundary,
                             guidance=5. if boundary is None else (4., 3.))
        made[name] = save_snapshot(wan, tmp_path_factory.mktemp(name))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, in the place of the usual one"""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache, folder, repo, commit="1" * 40, branch="main"):
    """A snapshot as `hf download` leaves it"""
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    ref = place / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return place / "snapshots" / commit


@pytest.fixture
def copy(folders, tmp_path):
    """A snapshot that may be damaged"""
    def make(name): return shutil.copytree(folders[name], tmp_path / "mine" / name)
    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights fails"""
    def read(cls, *args, **options): raise AssertionError(f"weights of {cls.__name__} were read")
    for base in (PreTrainedModel, ModelMixin):
        monkeypatch.setattr(base, "from_pretrained", classmethod(read))


def clip(): return torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VLMS)
def test_a_folder_is_enough(folders, name, recwarn):
    vlm = load_vlm(str(folders[name]), device="cpu", options=EXACT, n_frames=2)
    original = small(name)
    assert type(vlm) is find_adapter("vlm", name, VLMS) and vlm.settings.n_frames == 2
    for size in ("patch_size", "hidden_size", "n_layers", "n_heads", "vision_size",
                 "vision_layers", "vision_heads"):
        assert getattr(vlm.settings, size) == getattr(original.settings, size), size
    tokens = vlm.embed(clip())
    assert tokens.shape == (1, vlm.n_tokens, 32)
    assert vlm.next_token_log_probs(tokens, DESCRIBE).isfinite().all()
    weights = original.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in vlm.model.state_dict().items())
    merged = [str(warned.message) for warned in recwarn if "vision-lora" in str(warned.message)]
    assert len(merged) == (name == "phi4")


def test_every_type_of_model_has_one_adapter():
    assert sorted(MODEL_TYPES.values()) == sorted(VLMS)


def test_a_fine_tune_takes_three_lines(folders, monkeypatch):
    monkeypatch.chdir(folders["gemma3"].parent)
    vlm = load_vlm(f"./{folders['gemma3'].name}", device="cpu")
    log_probs = vlm.next_token_log_probs(vlm.embed(clip()), DESCRIBE)
    assert log_probs.shape == (1, vlm.model.config.text_config.vocab_size)


@pytest.mark.parametrize("name, experts", [("one", 1), ("two", 2)])
def test_a_generator_of_any_size(folders, name, experts):
    wan = load_generator(str(folders[name]), device="cpu", options=EXACT, clip_size=CLIP)
    kind = dict(n_layers=2) if experts == 1 else dict(
        n_layers=2, boundary_ratio=.875, guidance=(4., 3.))
    original = tiny_generator(**kind)
    for part in ("vae", "transformer", "text"):
        assert getattr(wan.config, part) == getattr(original.config, part)
    assert (wan.transformer_2 is None) == (experts == 1) and wan.config.frames == 9
    condition = wan.encode_prompt([RED])
    expected = original.encode_prompt([RED]).embeds
    assert torch.allclose(condition.embeds[:, :12], expected, atol=1e-5)
    latents = wan.noise([0])
    assert torch.allclose(wan.decode(latents), original.decode(latents), atol=1e-6)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_cache_needs_the_codec_alone(folders, name):
    "Text encoder and autoencoder: the experts, nearly all of a Wan, are not read"
    place = str(folders[name])
    whole = load_generator(place, device="cpu", options=EXACT, clip_size=CLIP)
    for options in (EXACT, LoadOptions(dtype="float32", offload="parts", checkpointing=True)):
        codec = load_generator(place, device="cpu", options=options, clip_size=CLIP, codec=True)
        assert not list(codec.transformer.parameters()) and codec.transformer_2 is None
        latents = whole.encode(clip())
        assert torch.equal(codec.encode(clip()), latents)
        assert torch.equal(codec.decode(latents), whole.decode(latents))
        assert torch.equal(codec.encode_prompt([RED]).embeds, whole.encode_prompt([RED]).embeds)
        vlm = small("phi4").freeze()
        assert model_digests(codec, vlm) == model_digests(whole, vlm) # the same cache
        asked = codec, vlm, COUPLING_PROBES
        assert made_for(*asked) == made_for(whole, vlm, COUPLING_PROBES)
    assert load_generator("wan", codec=True).transformer is not None # the miniature comes whole


def test_clips_of_a_release_have_a_size_without_being_asked(folders):
    def size(name):
        config = load_generator(str(folders[name]), device="cpu").config
        return config.frames, config.height, config.width
    assert size("two") == (61, 720, 720) and size("one") == (61, 480, 480)


@pytest.fixture
def native(copy):
    """VLMs whose processors keep the shape of frames, up to 16,384 pixels"""
    limits = {"size": {"shortest_edge": 256, "longest_edge": 16_384}}
    folders = {name: copy(name) for name in ("qwen25vl", "videollama3")}
    for folder in folders.values():
        (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return {name: str(folder) for name, folder in folders.items()}


def test_fewer_pixels_are_an_option_of_a_run(folders, native):
    wan, size = str(folders["one"]), "clip_size=9x32x32, n_frames=4"
    whole, fewer = (Transporter.load(native["qwen25vl"], wan, device="cpu", options=size + more)
                    for more in ("", ", max_pixels=256"))
    assert (whole.vlm.settings.max_pixels, fewer.vlm.settings.max_pixels) == (16_384, 256)
    assert whole.vlm.n_tokens == 4 * fewer.vlm.n_tokens  # 32 x 32 px against 16 x 16
    assert fewer.names["options"] == f"{size}, max_pixels=256"
    same = Transporter.load(native["qwen25vl"], wan, device="cpu", clip_size=(9, 32, 32),
                            n_frames=4, max_pixels=256)
    assert same.vlm.n_tokens == fewer.vlm.n_tokens and same.names == fewer.names


@pytest.mark.parametrize("name, most", [("gemma3", 50_176), ("qwen25vl", 100)])
def test_a_limit_of_pixels_is_checked_before_weights_are_read(
        folders, native, no_weights, name, most):
    folder = native.get(name, str(folders[name]))
    with pytest.raises(ValueError, match="max_pixels limits frames that keep their shape, to 16"):
        Transporter.load(folder, str(folders["one"]), device="cpu", max_pixels=most)


def test_a_plan_counts_fewer_pixels(folders, native, monkeypatch):
    vlm, wan = native["videollama3"], str(folders["one"])
    asked = vlm, "paper", LoadOptions(), "cuda", wan
    whole, fewer = (stage_cost("answer", *asked, most) for most in (None, 4096))
    assert fewer.flops < whole.flops and fewer.inputs < whole.inputs
    kept, less = (kept_bytes(vlm, "paper", wan, None, most) for most in (None, 4096))
    tokens = blank_vlm(vlm, "paper").n_tokens - blank_vlm(vlm, "paper", max_pixels=4096).n_tokens
    # two ways, kept twice, in float32
    assert tokens > 0 and kept["seen"] - less["seen"] == 2 * 2 * 4 * tokens * 32
    counted = []  # `plan` passes the option on to every stage
    monkeypatch.setattr(planning, "stage_cost", lambda *given: counted.append(given[-1]) or fewer)
    needs = planning.plan("explain", vlm, generator=wan, options="max_pixels=4096")
    assert set(counted) == {4096} and needs.kept == less


def test_names_and_repositories(folders, cache):
    wan = SOURCES["wan-1.3b"]
    put(cache, folders["one"], wan.repo, wan.revision)
    put(cache, folders["gemma3"], "google/gemma-3-4b-it", "2" * 40)
    put(cache, folders["smolvlm"], "someone/fine-tune", "3" * 40, "v1.0")
    assert load_generator("wan-1.3b", device="cpu", clip_size=CLIP).config.hub == wan.repo
    for name in ("google/gemma-3-4b-it", "google/gemma-3-4b-it@main",
                 f"google/gemma-3-4b-it@{'2' * 40}"):
        settings = load_vlm(name, device="cpu").settings
        assert (settings.hub_id, settings.revision) == ("google/gemma-3-4b-it", "2" * 40)
    assert load_vlm("someone/fine-tune@v1.0", device="cpu").name == "smolvlm"
    with pytest.raises(FileNotFoundError, match="at revision main, which is not in the local hub "
                       "cache; of this repository it has v1.0"):
        load_vlm("someone/fine-tune")


def test_the_download_of_our_own_command_is_complete(cache, folders):
    """The hub keeps the list of all files; ours are a part of them"""
    source = HubSource("someone/model", "1" * 40, ("*.json", "*.safetensors"), 0, "", "")
    folder = put(cache, folders["gemma3"], source.repo)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    entries = {name: TreeCacheEntry(size=1, blob_id="0" * 40) for name in [*names, "README.md"]}
    write_tree_cache(str(folder.parents[1]), "1" * 40, entries)
    assert cached_folder(source) == folder
    (folder / "config.json").unlink() # and half of one is named
    with pytest.raises(FileNotFoundError, match="it lacks config.json"): hub.require(source)


@pytest.fixture
def published(cache, folders):
    """What `scale="paper"` asks for"""
    put(cache, folders["two"], SOURCES["wan"].repo, SOURCES["wan"].revision)
    put(cache, folders["gemma3"], SOURCES["gemma3"].repo, SOURCES["gemma3"].revision)


def test_the_paper_scale_explains_without_a_coupling(published, capsys):
    l2v = Transporter.load(vlm="gemma3", scale="paper", device="cpu", clip_size=CLIP)
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0 and "Phi would add" in said and "train_paper" in said
    assert l2v.coupling is None and l2v.names["scale"] == "paper"
    e = l2v.explain(RED, CHANGE, strengths=2, steps=2, vlm_weight=1.)
    assert e.reencoded.target.isfinite().all() and not e.settings["coupled"]


def test_a_place_is_at_paper_scale(folders, capsys):
    l2v = Transporter.load(str(folders["gemma3"]), str(folders["one"]), device="cpu",
                           clip_size=CLIP, n_frames=3)
    assert l2v.names["scale"] == "paper" and l2v.vlm.settings.n_frames == 3
    assert "coupling_" in capsys.readouterr().out


def test_the_vlm_is_examined_before_the_generator_is_read(folders, no_weights):
    with pytest.raises(FileNotFoundError, match="no folder './absent'"):
        Transporter.load("./absent", str(folders["two"]), device="cpu")


def test_an_adapter_of_the_reader_is_found(tmp_path, monkeypatch):
    class Mine: model_class = SimpleNamespace(config_class=SimpleNamespace(model_type="mine"))
    monkeypatch.setitem(VLMS, "mine", Mine)
    monkeypatch.setitem(VLMS, "broken", "no.such.module:Adapter")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    (tmp_path / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    assert find_model("vlm", str(tmp_path)).adapter is Mine


# ---------------------------------------------------------------------------------------- faults
def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder): return sorted(folder.glob("*-of-*.safetensors"))


def lose(folder): shards(folder)[1].unlink()
def halve(folder): shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-7])
def point(folder): shards(folder)[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
def lose_index(folder): (folder / "model.safetensors.index.json").unlink()
def lose_config(folder): (folder / "config.json").unlink()
def tear(folder): (folder / "config.json").write_text('{"model_type": ')
def pickle(folder): (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
def pickle_below(folder):
    (folder / "vision-lora").mkdir()
    (folder / "vision-lora" / "adapter.pt").write_bytes(b"\x80\x04.")


def only_pickle(folder):
    for path in folder.glob("*.safetensors*"): path.unlink()
    (folder / "model.ckpt").write_bytes(b"\x80\x04.")


def other_class(folder):
    edit(folder / "config.json", model_type="llava", architectures=["LlavaForCausalLM"])


def own_code(folder): edit(folder / "config.json", model_type="phi4mm")
def lora(folder):
    for path in folder.iterdir(): path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma"}')
    (folder / "adapter_model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"): path.unlink()


def other_tokenizer(folder): word_tokenizer(WORDS, ["<pad>", "<unk>"]).save_pretrained(folder)
def larger_tokenizer(folder):
    names = [f"<{k}>" for k in range(2000)]
    special = ["<pad>", "<unk>", *names, "<image_soft_token>", "<end_of_turn>"]
    word_tokenizer(WORDS, special).save_pretrained(folder)


FAULTS = [
    (lose, FileNotFoundError, "it lacks model-00002-of-", "Copy the folder again"),
    (halve, ValueError, "model-00002-of-.* holds .* of .* bytes", "Copy the folder again"),
    (point, ValueError, "is a pointer of Git LFS", "Copy the folder again"),
    (lose_index, FileNotFoundError, "it lacks model.safetensors.index.json", "Copy the folder"),
    (lose_config, FileNotFoundError, "it lacks config.json", "Copy the folder"),
    (tear, ValueError, "config.json in .* is no whole JSON", "copy this file again"),
    (pickle, ValueError, "holds pytorch_model.bin: a pickle may run any code", "Move it out"),
    (pickle_below, ValueError, "holds vision-lora/adapter.pt: a pickle", "Move it out"),
    (only_pickle, ValueError, "holds model.ckpt: a pickle", "convert it with"),
    (other_class, ValueError, "'LlavaForCausalLM' .*no adapter. The adapters: phi4", "bring_your"),
    (own_code, ValueError, "model_type 'phi4mm'", "Phi-4-multimodal-instruct@refs/pr/70"),
    (lora, ValueError, "an adapter of peft and no model", "merge_and_unload"),
    (no_tokenizer, ValueError, "tokenizer", "Save the tokenizer of the model that was fine-tuned"),
    (other_tokenizer, ValueError, "must hold the image token of gemma3, '<image_soft_token>'",
     "Save the tokenizer of the model"),
    (larger_tokenizer, ValueError, "it has it at 2,00", "Save the tokenizer of the model"),
]


def name_of(value): return getattr(value, "__name__", "")


@pytest.mark.parametrize("damage, kind, rule, fix", FAULTS, ids=name_of)
def test_a_fault_of_a_vlm_is_named_before_weights_are_read(
        copy, no_weights, damage, kind, rule, fix):
    folder = copy("gemma3")
    damage(folder)
    with pytest.raises(kind, match=rule) as error: load_vlm(str(folder), device="cpu")
    assert fix in str(error.value) and str(folder) in str(error.value)


def drop_expert(folder): (folder / "transformer_2" / "config.json").unlink()
def pickle_of_vae(folder): (folder / "vae" / "vae.pth").touch()
def from_an_image(folder):
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline")


@pytest.mark.parametrize("damage, kind, rule", [
    (drop_expert, FileNotFoundError, "it lacks transformer_2/config.json"),
    (pickle_of_vae, ValueError, "holds vae/vae.pth: a pickle"),
    (from_an_image, ValueError,
     "pipeline 'WanImageToVideoPipeline', for which there is no adapter"),
])
def test_a_fault_of_a_generator_is_named_before_weights_are_read(
        copy, no_weights, damage, kind, rule):
    folder = copy("two")
    damage(folder)
    with pytest.raises(kind, match=rule): load_generator(str(folder), device="cpu")


def test_the_files_of_a_trainer_are_left_alone(copy):
    folder = copy("gemma3")
    (folder / "training_args.bin").write_bytes(b"never opened")
    assert load_vlm(str(folder), device="cpu").name == "gemma3"


def test_weights_that_are_absent_are_not_drawn(copy):
    from safetensors.torch import load_file, save_file
    folder = copy("gemma3")
    weights = {}
    for path in shards(folder): weights |= load_file(path)
    (folder / "model.safetensors.index.json").unlink()
    for path in shards(folder): path.unlink()
    lost = next(name for name in weights if "vision" in name)
    save_file({name: value for name, value in weights.items() if name != lost},
              folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 tensors"):
        load_vlm(str(folder), device="cpu")


def test_a_vlm_is_no_generator(folders):
    with pytest.raises(ValueError, match="is a generator. Load it with load_generator"):
        load_vlm(str(folders["one"]))
    with pytest.raises(ValueError, match="is a vlm. Load it with load_vlm"):
        load_generator(str(folders["gemma3"]))


def test_a_disk_that_is_too_small_is_named(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 3 * 10**9, 3 * 10**9)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FileNotFoundError) as error: load_vlm("gemma3", scale="paper")
    assert "only 3.0 GB free: free 21.4 GB, or set HF_HOME" in str(error.value)
    with pytest.raises(FileNotFoundError, match="size unknown, 3.0 GB are free"):
        load_vlm("google/gemma-3-4b-it")


@pytest.mark.parametrize("name", ["", "gemma-3", "a/b/c", "../no/such/folder"])
def test_names_that_are_none(name):
    with pytest.raises((ValueError, FileNotFoundError)) as error: load_vlm(name)
    assert "named" in str(error.value) or "no folder" in str(error.value)


def test_the_doctor_reports_what_a_loader_would(published, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "cost", lambda *names: [])
    assert doctor.main(["--scale", "paper", "--vlm", "gemma3"]) == 0
    said = capsys.readouterr().out
    assert "gemma3: complete" in said and "phi4: not here, 10.2 GB" in said and "->" not in said
    assert doctor.main(["--scale", "paper", "--vlm", "phi4"]) == 1
    said = capsys.readouterr().out
    assert "-> scale 'paper' needs microsoft/Phi-4" in said
    assert said.splitlines()[-1].startswith("next       hf download microsoft/Phi-4")
