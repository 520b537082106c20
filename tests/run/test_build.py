"""Parts: devices and dtypes, a build from a folder, evaluation settings that go away again, other weights."""

import json
import os
import subprocess
import sys

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
    config = settings(folder, device="auto", dtype="auto", attn_implementation="auto")
    built = build.parts(config)
    assert (config.device, config.dtype, config.attn_implementation) == ("cpu", "bfloat16", "sdpa")
    assert not built.sampler.varlen
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


# --- the process that a command sets up ---------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two emulated GPUs; PyTorch's settings are put back. A list of the devices made the current one."""
    cudnn, benchmark = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    current, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield current
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name, current", [("cuda:1", ["cuda:1"]), ("cuda", []), ("auto", []), ("cpu", [])])
def test_the_device_becomes_the_current_one(gpus, name, current):
    """A device without a number is the current one already."""
    assert build.set_up_device(name) == name.replace("auto", "cuda")
    assert gpus == current


def test_cudnn_attention_is_off_where_a_gpu_computes(gpus):
    build.set_up_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    build.set_up_device("cuda:0")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("name", ["cuda:2", "cuda:99"])
def test_a_gpu_that_is_not_there(gpus, name):
    expected = rf"device must be one .* has, got '{name}' \(PyTorch sees 2, the first is cuda:0\)"
    with pytest.raises(ValueError, match=expected):
        build.set_up_device(name)
    assert gpus == []


@pytest.mark.parametrize("name", ["rocm:0", "hip"])
def test_devices_of_rocm_have_another_name(name):
    with pytest.raises(ValueError, match="PyTorch calls ROCm's devices cuda"):
        build.choose_device(name)


@pytest.mark.parametrize("given, used", [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_algorithms_come_before_the_gpu_is_touched(gpus, monkeypatch, given, used):
    def choose(name):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would only warn
        return name

    monkeypatch.setattr(build, "choose_device", choose)
    torch.backends.cudnn.benchmark = True
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    build.set_up_device("cuda:1", deterministic=True)
    assert gpus == ["cuda:1"] and not torch.backends.cudnn.benchmark


def test_cublas_workspaces_that_are_not_deterministic(gpus, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:4096")
    build.set_up_device("cuda:1")
    with pytest.raises(ValueError, match="must be :4096:8 or :16:8 with deterministic true, got ':8:4096'"):
        build.set_up_device("cuda:1", deterministic=True)


def test_the_parts_are_built_on_the_device_that_was_set_up(folder, monkeypatch):
    """The parts of all commands: failures, evaluate, interact, train."""
    events, load = [], build.weights.load

    def set_up(name, *, deterministic):
        events.append((name, deterministic))
        return "cpu"

    def watched_load(source, dtype, device, **options):
        events.append(device)
        return load(source, dtype=dtype, device=device, **options)

    monkeypatch.setattr(build, "set_up_device", set_up)
    monkeypatch.setattr(build.weights, "load", watched_load)
    built = build.parts(settings(folder, device="cuda:1", deterministic=True))
    assert events == [("cuda:1", True), "cpu"] and built.device == built.config.device == "cpu"


def test_an_import_changes_no_setting_of_pytorch():
    code = """
import os, pkgutil, torch
def settings():
    return (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
before = settings()
import grpo, grpo_kernels, train
for package in (grpo, grpo_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
assert settings() == before, (before, settings())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_peak_memory_is_that_of_the_device(monkeypatch):
    held = {"cuda:0": 1e9, "cuda:1": 3e9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[device])
    assert build.peak_memory_gb("cuda:1") == 3.0
