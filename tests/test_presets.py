"""Presets, run for two steps on a random small Qwen2: all but the sizes is as they have it."""

import json

import pytest
import tiny
import tiny_run

from grpo import config as configuration
from grpo.model import weights
from grpo.tasks import get_task

# What makes a run small; all other settings stay the preset's.
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "groups_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_reflection_length": 6,
    "num_examples": 4,
    "max_steps": 2,
    "num_validation": 2,
    "num_eval": 2,
    "cache_gb": 1,
}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """The family of the paper's models: biases of q, k and v, tied embeddings, ChatML."""
    tokenizer = tiny.byte_tokenizer(template=tiny.CHATML)
    stops = [tiny.token_id(tokenizer, text) for text in tiny.STOPS]
    sizes = {"model_type": "qwen2", "max_position_embeddings": 16384}
    model = tiny.decoder(len(tokenizer), likely=stops, **sizes)
    config = {**tiny.HF_CONFIG, **sizes, "vocab_size": len(tokenizer), "architectures": ["Qwen2ForCausalLM"]}
    model.source = weights.Source(config, {"eos_token_id": stops})
    return weights.save(model, tokenizer, tmp_path_factory.mktemp("qwen2") / "model")


@pytest.mark.parametrize("preset", ["paper_countdown", "paper_function_calling"])
def test_two_steps_of_a_preset(preset, qwen2, tmp_path):
    settings = {**SMALL, "preset": preset, "model_name_or_path": qwen2, "output_dir": tmp_path}
    if preset == "paper_function_calling":
        settings["task_options"] = json.dumps({"max_characters": 1500})
    done = tiny_run.run([text for name, value in settings.items() for text in (f"--{name}", str(value))])
    assert done.status == 0, done.err
    steps = [record for record in tiny_run.records(done.folder) if "reward" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all("kl" in record and record["completions/max_length"] <= 6 for record in steps)
    used = configuration.load(done.folder / "config.yaml")
    given = configuration.parse(["--preset", preset])
    assert {"learning_rate", "beta", "temperature", "warmup_steps"} <= {
        name for name in vars(given) if getattr(used, name) == getattr(given, name)
    }
    assert (done.folder / "evaluation.json").exists() and not used.warm_start_steps


def test_two_steps_of_another_model_without_a_preset(qwen2, tmp_path):
    settings = {**SMALL, "model_name_or_path": qwen2, "output_dir": tmp_path}
    done = tiny_run.run([text for name, value in settings.items() for text in (f"--{name}", str(value))])
    assert done.status == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("preset model")]
    assert "warm_start_steps 0, learning_rate 1e-06" in line
    assert done.folder.name == "model-001" and not (done.folder / "warm_start.jsonl").exists()


def test_two_steps_of_the_function_calling_demo(qwen2, tmp_path):
    settings = {
        **SMALL,
        "preset": "function_calling_demo",
        "model_name_or_path": qwen2,
        "output_dir": tmp_path,
    }
    settings |= {"warm_start_steps": 2, "overlong_buffer": 2, "eval_steps": 1}
    done = tiny_run.run([text for name, value in settings.items() for text in (f"--{name}", str(value))])
    assert done.status == 0, done.err
    figures = json.loads((done.folder / "evaluation.json").read_text())
    assert list(figures["models"]) == ["untouched", "before_rl", "trained"]


def test_the_function_calling_demo_uses_no_example_twice():
    c = configuration.parse(["--preset", "function_calling_demo"])
    task = get_task(c.task, c.task_options)
    assert len(task.examples("train", c.num_examples + c.warm_start_examples)) == 378
    assert task.examples("heldout", c.num_eval) and task.examples("validation", c.num_validation)
    for split, count in (("train", 379), ("heldout", c.num_eval + 1), ("validation", c.num_validation + 1)):
        with pytest.raises(ValueError, match="were asked for"):
            task.examples(split, count)


@pytest.mark.parametrize("preset", ["paper_countdown", "paper_function_calling"])
def test_they_hold_the_figures_of_the_paper(preset):
    c = configuration.parse(["--preset", preset])
    assert (c.num_generations, c.temperature, c.beta, c.learning_rate) == (8, 0.9, 0.001, 5e-7)
    assert (c.lr_scheduler_type, c.warmup_steps, c.max_steps) == ("cosine", 0.03, 1750)
    assert c.groups_per_step * c.num_generations == 256
    assert c.train_on == "reflection" and c.use_bias_correction_kl is False and c.warm_start_steps == 0
