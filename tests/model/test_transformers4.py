"""What transformers 4 reads from the checkpoints that we save: the same logits, stops, ids and chat template.

`make test-transformers4` installs version 4.57 in .venv/transformers4 and runs this file with TRANSFORMERS4
set to that folder. This process saves checkpoints with transformers 5; another one, this file as a script,
reads them with transformers 4.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = os.environ.get("TRANSFORMERS4")
TEXT = "<s>ab ac</s> 2 + 3 = 5"
MESSAGES = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


def read(folder: Path) -> None:
    """With transformers 4: writes what it reads from `folder` to seen.json and logits.safetensors there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    assert __version__.startswith("4."), __version__
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.float()(ids_of(model.config.vocab_size)).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
    seen = {
        "stops": model.generation_config.eos_token_id,
        "ids": tokenizer.encode(TEXT),
        "text": tokenizer.decode(tokenizer.encode(TEXT)),
        "chat": tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True),
        "special": tokenizer.additional_special_tokens,
    }
    (folder / "seen.json").write_text(json.dumps(seen))


def ids_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        read(Path(argument))
    sys.exit()

import tiny  # noqa: E402
import tiny_model  # noqa: E402

from grpo.chat import Chat  # noqa: E402
from grpo.config import Config  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.run import build  # noqa: E402

pytestmark = pytest.mark.skipif(FOLDER is None, reason="needs transformers 4: make test-transformers4")
YARN = tiny_model.YARN | {"rope_theta": 500.0}
FAMILIES = {
    "llama": ("Llama", {"rope_theta": 500.0}, None),
    "llama-3": ("Llama", {"rope_parameters": tiny_model.LLAMA3 | {"rope_theta": 5e5}}, None),
    "llama-linear": ("Llama", {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}}, None),
    "llama-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12},
        None,
    ),
    "mistral-window": ("Mistral", {"sliding_window": 8, "rope_theta": 500.0}, None),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}, None),
    "qwen3": ("Qwen3", {"head_dim": 24, "rope_theta": 500.0}, None),
    "phi3": ("Phi3", {"rope_theta": 500.0}, None),
    "phi3-longrope": ("Phi3", tiny_model.PHI3, None),
    "gguf-llama-3": ("Llama", {"rope_parameters": tiny_model.LLAMA3}, tiny_model.llama3_divisors),
    "gguf-qwen2-yarn": ("Qwen2", {"rope_parameters": tiny_model.YARN}, tiny_model.yarn),
    "gguf-phi3-longrope": ("Phi3", tiny_model.PHI3, tiny_model.longrope_divisors),
}


def save_family(name: str, folder: Path):
    family, options, gguf = FAMILIES[name]
    theirs = tiny_model.make(family, **options)
    source = folder / "source"
    if gguf is None:
        tokenizer = tiny_model.tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<unused0>", "<unused1>"]})
        theirs.save_pretrained(source)
        tokenizer.save_pretrained(source)
    else:
        source = folder / "model.gguf"
        tiny_model.write_gguf(source, theirs, extra=gguf)
    model, tokenizer = weights.load(source)
    stops = weights.stop_token_ids(model, tokenizer)
    return model, tokenizer, stops, weights.save(model, tokenizer, folder / "saved")


def save_demo(folder: Path):
    model, tokenizer = weights.load(tiny_model.DEMO)
    stops = Chat(tokenizer, weights.stop_token_ids(model, tokenizer)).stop_token_ids
    return model, tokenizer, stops, weights.save(model, tokenizer, folder / "saved", stop_ids=stops)


def save_chatml_on_a_base_model(folder: Path):
    """A base model that stops at <|endoftext|> and has no template; the run's template has another end."""
    tokenizer = tiny.byte_tokenizer(template=None)
    model = tiny.decoder(len(tokenizer))
    end = tiny.token_id(tokenizer, "<|endoftext|>")
    config = {**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "architectures": ["LlamaForCausalLM"]}
    model.source = weights.Source(config, {"eos_token_id": end})
    (folder / "chatml.jinja").write_text(tiny.CHATML)
    chat = build.build_chat(Config(chat_template=str(folder / "chatml.jinja")), model, tokenizer)
    assert set(chat.stop_token_ids) > {end}
    saved = weights.save(model, tokenizer, folder / "saved", stop_ids=chat.stop_token_ids)
    return model, tokenizer, chat.stop_token_ids, saved


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> model, tokenizer, stop ids and folder; transformers 4 has read each."""
    pytest.importorskip("gguf")
    saved = {name: save_family(name, tmp_path_factory.mktemp("family")) for name in FAMILIES}
    saved["demo"] = save_demo(tmp_path_factory.mktemp("demo"))
    saved["chatml-on-base"] = save_chatml_on_a_base_model(tmp_path_factory.mktemp("base"))
    folders = [str(folder) for *_, folder in saved.values()]
    environment = {**os.environ, "PYTHONPATH": str(Path(FOLDER).resolve())}
    subprocess.run([sys.executable, __file__, *folders], env=environment, check=True)
    return saved


@pytest.mark.parametrize("name", [*FAMILIES, "demo", "chatml-on-base"])
def test_transformers4_reads_what_the_run_used(name, checkpoints):
    model, tokenizer, stops, folder = checkpoints[name]
    seen = json.loads((folder / "seen.json").read_text())
    with torch.no_grad():
        logits = model.logits(model(ids_of(model.config.vocab_size)))
    theirs = load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, theirs, atol=1e-3, rtol=1e-4)
    assert seen["stops"] == list(stops)
    assert seen["ids"] == tokenizer.encode(TEXT)
    assert seen["text"] == tokenizer.decode(seen["ids"])
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert seen["chat"] == tokenizer.encode(prompt, add_special_tokens=False)
    if name in FAMILIES and not name.startswith("gguf"):
        assert seen["special"] == ["<unused0>", "<unused1>"]
