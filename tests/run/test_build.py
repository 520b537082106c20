"""Parts: devices and dtypes, a build from a folder, evaluation settings that go away again, other weights."""

import json

import pytest
import tiny
import torch
import transformers

from grpo.config import Config
from grpo.run import build


def save_folder(path, seed=0, **changes):
    """An HF folder as a user has one."""
    tokenizer = tiny.byte_tokenizer(template=tiny.CHATML)
    torch.manual_seed(seed)
    config = {**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "eos_token_id": 258, **changes}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"))


def settings(folder, **changes):
    return Config(**{**tiny.SETTINGS, "model_name_or_path": folder, **changes})


def test_build_puts_the_settings_where_they_belong(folder):
    changes = {
        "max_rows": 7,
        "cache_gb": 0.5,
        "overlong_buffer": 3,
        "soft_overlong_penalty": 0.25,
        "seed": 11,
    }
    built = build.parts(settings(folder, **changes))
    sampler, rollout = built.sampler, built.rollout
    assert (sampler.temperature, sampler.max_rows, sampler.cache_gb, sampler.greedy) == (0.8, 7, 0.5, False)
    assert (sampler.top_p, sampler.top_k) == (1.0, 0)
    assert sampler.model is built.model and rollout.sampler is sampler  # one copy of the weights
    assert (rollout.seed, rollout.max_completion_length, rollout.max_reflection_length) == (11, 8, 10)
    assert (rollout.overlong_buffer, rollout.soft_overlong_penalty) == (3, 0.25)
    assert isinstance(built.task, tiny.Toy) and rollout.task is built.task
    # The configuration's own end of text, the tokenizer's, and the template's end of turn.
    assert sampler.stop_token_ids == built.chat.stop_token_ids and {256, 258} <= set(sampler.stop_token_ids)
    assert built.rollout.attempts(built.task.examples("train", 1), stage="failures")[0].turn.ids


def test_auto_settings_are_resolved_in_the_config(folder, monkeypatch):
    monkeypatch.setattr(build, "choose_device", lambda name: "cpu")
    monkeypatch.setattr(build, "choose_dtype", lambda name, device: "bfloat16")
    config = settings(folder, device="auto", dtype="auto")
    built = build.parts(config)
    assert (config.device, config.dtype) == ("cpu", "bfloat16")
    assert built.dtype == torch.bfloat16 == built.model.output_weight.dtype


def test_a_chat_template_from_a_file(folder, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(tiny.CHATML.replace("<|im_start|>", "<s>"))
    built = build.parts(settings(folder, chat_template=str(path)))
    assert built.tokenizer.decode(built.chat.prompt([{"role": "user", "content": "x"}])).startswith("<s>user")
    with pytest.raises(ValueError, match="chat_template must be a readable text file"):
        build.parts(settings(folder, chat_template=str(tmp_path / "none")))
    path.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match="chat_template cannot be rendered"):
        build.parts(settings(folder, chat_template=str(path)))


def test_load_into_replaces_the_weights_in_place(folder, tmp_path):
    built = build.parts(settings(folder))
    weight, example = built.model.output_weight, built.task.examples("train", 1)
    before = built.rollout.attempts(example, stage="failures")
    other = save_folder(tmp_path / "other", seed=1)
    build.load_into(built, other)
    assert built.model.output_weight is weight
    fresh = build.parts(settings(folder), model_source=other)
    assert torch.equal(weight, fresh.model.output_weight)
    after = built.rollout.attempts(example, stage="failures")
    assert after == fresh.rollout.attempts(example, stage="failures") and after != before
    build.load_into(built, folder)
    assert built.rollout.attempts(example, stage="failures") == before
    with pytest.raises(ValueError, match="state_dict"):
        build.load_into(built, save_folder(tmp_path / "wider", intermediate_size=64))


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, (1.0, True)), (0.5, (0.5, False))])
def test_evaluation_sampling_is_undone(temperature, expected):
    built = tiny.build(eval_temperature=temperature)
    sampler = built.sampler
    with build.evaluation_sampling(built):
        assert (sampler.temperature, sampler.greedy) == expected
    assert (sampler.temperature, sampler.greedy) == (0.8, False)
    with pytest.raises(KeyboardInterrupt), build.evaluation_sampling(built):
        raise KeyboardInterrupt
    assert (sampler.temperature, sampler.greedy) == (0.8, False)


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.choose_device("auto") == "cuda" and build.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert build.choose_device("auto") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert build.choose_device("auto") == "cpu"
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(ValueError, match="device must be one that this machine has, got"):
            build.choose_device(name)


# --- dtype: auto ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reflect-grpo" / "bfloat16_speedup.json"


@pytest.mark.parametrize(("speedup", "dtype"), [(10.0, "bfloat16"), (1.1, "float32"), (0.14, "float32")])
def test_choose_dtype_measures_on_a_cpu(monkeypatch, cache, speedup, dtype):
    monkeypatch.setattr(build, "bfloat16_speedup", lambda: speedup)
    assert build.choose_dtype("auto", "cuda") == "bfloat16"
    assert build.choose_dtype("float32", "cpu") == "float32" and not cache.exists()
    assert build.choose_dtype("auto", "cpu") == dtype and cache.exists()


def test_a_machine_that_is_busy_later_does_not_change_the_dtype(monkeypatch, cache, capsys):
    monkeypatch.setattr(build, "bfloat16_speedup", lambda: 3.1)
    assert build.choose_dtype("auto", "cpu") == "bfloat16"
    said = f"dtype: bfloat16, 3.1 times as fast as float32 here (measured; kept in {cache})\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(build, "bfloat16_speedup", lambda: 0.5)
    assert build.choose_dtype("auto", "cpu") == "bfloat16"
    assert "measured earlier" in capsys.readouterr().out
    # Another machine, PyTorch or number of threads is measured anew, and nothing is forgotten.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert build.choose_dtype("auto", "cpu") == "float32"
    assert sorted(json.loads(cache.read_text()).values()) == [0.5, 3.1]
    assert capsys.readouterr().out.startswith("dtype: float32; bfloat16 is 0.5 times as fast here (measured;")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": []}'])
def test_a_damaged_cache_is_replaced(monkeypatch, cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    monkeypatch.setattr(build, "bfloat16_speedup", lambda: 2.0)
    assert build.choose_dtype("auto", "cpu") == "bfloat16"
    assert list(json.loads(cache.read_text()).values()) == [2.0]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build, "bfloat16_speedup", lambda: 2.0)
    assert build.choose_dtype("auto", "cpu") == "bfloat16"
    assert "cannot be written" in capsys.readouterr().out


def test_the_dtypes_are_measured_in_turns(monkeypatch):
    dtypes, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: [dtypes.append(x.dtype), linear(x, w)])
    assert 0 < build.bfloat16_speedup(seconds=0) < 1000
    assert dtypes == [torch.float32, torch.bfloat16] * 6


def test_memory():
    build.keep_freed_memory()
    assert 0.01 < build.peak_memory_gb("cpu") < 1000
