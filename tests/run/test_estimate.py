"""grpo/run/estimate.py against models that are built, allocations that are counted, and settings that fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from lib.measure import flops  # noqa: E402
from lib.memory import Case, allocated, tracked  # noqa: E402
from lib.paper_models import PAPER_MODELS  # noqa: E402
from ranks import together  # noqa: E402

import train  # noqa: E402
from grpo.config import Config  # noqa: E402
from grpo.model import lora, weights  # noqa: E402
from grpo.model.decoder import Decoder, ModelConfig  # noqa: E402
from grpo.run import build, estimate  # noqa: E402

GB = 1e9
GPU = Config(device="cuda", dtype="bfloat16")
SEVEN = ModelConfig.from_hf(PAPER_MODELS["Qwen/Qwen2-7B-Instruct"])
SIZES = {
    **tiny.HF_CONFIG,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "vocab_size": 3000,
}
LENGTHS = estimate.Lengths(prompt=64, completion=17, trained=17, after=8)  # few steps of decoding


def small(**settings):
    settings = {"groups_per_step": 2, "num_generations": 8, "max_rows": 8} | settings
    tokens = LENGTHS.prompt + settings["num_generations"] * (LENGTHS.completion - 1)  # a group's tree
    config = Config(device="cpu", dtype="float32", max_tokens_per_micro_batch=tokens)
    return Case(replace(config, **settings), SIZES, LENGTHS)


# --- sizes ------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 24},
    "phi3": {},
    "mistral": {},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_of_the_decoder(model_type):
    model = ModelConfig.from_hf({**SIZES, "model_type": model_type, **FAMILIES[model_type]})
    with torch.device("meta"):
        decoder = Decoder(model)
    assert estimate.parameters(model) == sum(p.numel() for p in decoder.parameters())
    assert estimate.layer_parameters(model) == sum(p.numel() for p in decoder.layers[0].parameters())


def test_the_papers_models_have_their_published_sizes():
    published = [1.54, 1.54, 1.78, 3.09, 3.21, 3.82, 7.62, 8.03]  # billions, from their model cards
    models = [ModelConfig.from_hf(sizes) for sizes in PAPER_MODELS.values()]
    assert [round(estimate.parameters(model) / 1e9, 2) for model in models] == published


@pytest.mark.parametrize("modules", ["all-linear", "q_proj,down_proj"])
def test_trained_parameters_of_an_adapter(modules):
    model = ModelConfig.from_hf(SIZES)
    adapter = lora.fresh(model, r=4, lora_alpha=8.0, target_modules=modules.split(","))
    config = replace(GPU, lora_r=4, lora_target_modules=modules)
    expected = sum(low.a.numel() + low.b.numel() for low in adapter.values())
    assert estimate.trained_parameters(config, model) == expected
    assert estimate.trained_parameters(GPU, model) == estimate.parameters(model)


# --- memory, counted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16", "beta": 0.0, "gradient_checkpointing": True}])
def test_estimates_are_within_15_percent_of_what_pytorch_allocates(settings):
    """The first case takes most in its update, the second one in its rollout."""
    case = small(**settings)
    assert case.estimates()["both"] == pytest.approx(allocated(case, "both"), rel=0.15)


def two_ranks(parallel, dtype):
    return Case(small(parallel=parallel, dtype=dtype).config, SIZES, LENGTHS, ranks=2)


def allocated_by_two_ranks(parallel, dtype):
    return allocated(two_ranks(parallel, dtype), "both")


@pytest.mark.parametrize(
    ("parallel", "dtype"), [("replicate", "bfloat16"), ("fsdp", "float32"), ("fsdp", "bfloat16")]
)
def test_estimates_of_two_ranks_are_within_15_percent_of_what_pytorch_allocates(parallel, dtype):
    counted = max(together(2, allocated_by_two_ranks, parallel, dtype))
    assert two_ranks(parallel, dtype).estimates()["both"] == pytest.approx(counted, rel=0.15)


def test_the_estimate_of_an_update_is_within_15_percent_of_its_tensors():
    case = small()
    assert case.estimates()["update"] == pytest.approx(tracked(case), rel=0.15)


def test_flops_of_an_update_are_those_of_its_products():
    case = small(beta=0.1)
    work = estimate.step(case.config, case.model, LENGTHS)
    _, learner, _ = case.run("")
    counted = sum(flops(lambda: learner.step(case.episodes)).values())
    # PyTorch counts no attention on a CPU: here for each token that sees a key, in four passes.
    prompt, completion = LENGTHS.prompt, LENGTHS.completion - 1
    pairs = 2 * (prompt**2 / 2 + 8 * completion * (prompt + completion / 2))
    attention = 4 * 4 * case.model.num_layers * case.model.num_heads * case.model.head_dim * pairs
    assert work.update_flops - attention == pytest.approx(counted, rel=0.002)  # norms have no products
    assert work.learned == 2 * (prompt + 8 * completion)


def test_distilled_retries_cost_an_update_on_as_many_attempts():
    """If all retries are right and differ. Only retries are sampled, and they are there anyway."""
    model, config = ModelConfig.from_hf(SIZES), Config(device="cpu", dtype="float32", beta=0.1)
    attempts = replace(config, train_on="attempt", beta=0.0)
    plain, both, extra = (
        estimate.step(c, model) for c in (config, replace(config, distill_retries=0.5), attempts)
    )
    assert both.sampled == plain.sampled and both.rollout_flops == plain.rollout_flops
    assert both.learned == plain.learned + extra.learned
    assert both.update_flops == pytest.approx(plain.update_flops + extra.update_flops)


# --- memory, by formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "parallel", "ranks", "expected"),
    # per parameter: weights, masters, moments, gradients, reference
    [
        ("bfloat16", "replicate", 1, [2, 4, 8, 4, 2]),
        ("float32", "replicate", 1, [4, 0, 8, 4, 4]),
        ("bfloat16", "replicate", 4, [2, 1, 2, 5, 2]),
        ("float32", "replicate", 4, [4, 0, 2, 5, 4]),
        ("bfloat16", "fsdp", 4, [2, 1, 2, 1, 0.5]),
        ("float32", "fsdp", 4, [4, 1, 2, 1, 1]),
    ],
)
def test_what_is_kept_per_parameter(dtype, parallel, ranks, expected):
    memory = estimate.per_rank(replace(GPU, dtype=dtype), SEVEN, ranks=ranks, parallel=parallel)
    kept = [getattr(memory, name) for name in memory.KEPT[:5]]
    count = estimate.parameters(SEVEN)
    assert kept == pytest.approx([bytes_each * count for bytes_each in expected], abs=2)
    assert memory.total == memory.kept + max(memory.rollout.total, memory.update.total)


def test_beta_0_and_lora_need_no_reference():
    assert estimate.per_rank(replace(GPU, beta=0.0), SEVEN).reference == 0
    adapter = estimate.per_rank(replace(GPU, lora_r=8), SEVEN)
    trained = estimate.trained_parameters(replace(GPU, lora_r=8), SEVEN)
    assert adapter.reference == 0 and adapter.moments == 8 * trained
    assert adapter.weights == 2 * (estimate.parameters(SEVEN) + trained)


def test_caches_are_bounded_by_the_setting_and_by_the_rows():
    row = estimate.caches(replace(GPU, max_rows=1, cuda_graphs=False), SEVEN, LENGTHS)
    assert row == (1 + LENGTHS.conversation) * 2 * 28 * 4 * 128 * 2
    assert estimate.caches(replace(GPU, max_rows=64, cache_gb=1e-3), SEVEN, LENGTHS) == 1_000_000


def test_ranks_must_be_positive():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        estimate.per_rank(GPU, SEVEN, ranks=0)


# --- what fits --------------------------------------------------------------------------------------------


def test_auto_replicates_if_that_fits():
    def choose(capacity, ranks=8, **settings):
        return estimate.choose_parallel(replace(GPU, **settings), SEVEN, ranks=ranks, capacity=capacity * GB)

    needed = estimate.per_rank(GPU, SEVEN, ranks=8).total / GB
    assert choose(needed / estimate.USABLE + 1) == "replicate"
    assert choose(needed / estimate.USABLE - 1) == "fsdp"
    assert choose(1, parallel="replicate") == "replicate"
    assert choose(1, ranks=1) == "replicate"  # there is nothing to share


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("capacity", [24, 40, 80])
@pytest.mark.parametrize("parallel", ["auto", "replicate"])
def test_the_settings_that_are_named_do_fit(ranks, capacity, parallel):
    config = replace(GPU, parallel=parallel, max_tokens_per_micro_batch=16384, cache_gb=24, max_rows=256)
    found = estimate.changes_that_fit(config, SEVEN, ranks=ranks, capacity=capacity * GB)
    assert found
    for change, total in found:
        changed = replace(config, **{name: value for name, value in change.items() if name != "ranks"})
        count = change.get("ranks", ranks)
        mode = estimate.choose_parallel(changed, SEVEN, ranks=count, capacity=capacity * GB)
        assert total == estimate.per_rank(changed, SEVEN, ranks=count, parallel=mode).total
        assert total <= estimate.USABLE * capacity * GB
        for name in set(change) - {"ranks"}:
            assert f"--{name} " in estimate.options(change)


def test_a_run_that_cannot_fit_is_refused_with_settings_that_would():
    estimate.check(GPU, SEVEN, ranks=8, parallel="fsdp", capacity=80 * GB)
    expected = r"needs 1\d\d GB of memory with these settings, and cuda has 80 GB; .* with .*--lora_r 32"
    with pytest.raises(ValueError, match=expected):
        estimate.check(GPU, SEVEN, ranks=1, parallel="replicate", capacity=80 * GB)
    with pytest.raises(ValueError, match="on each of 2 ranks .* no setting would make it fit"):
        estimate.check(GPU, SEVEN, ranks=2, parallel="fsdp", capacity=1 * GB)


# --- the command ------------------------------------------------------------------------------------------


def test_target():
    assert estimate.target("here") == (None, None)
    assert estimate.target("8") == (8, None)
    assert estimate.target("8x80GB") == estimate.target("8x80") == (8, 80 * GB)
    assert estimate.target("2x141.5gb") == (2, 141.5 * GB)


@pytest.mark.parametrize("text", ["", "0", "x80GB", "8x", "8x0GB", "-1", "8x80TB", "8 x 80", "many", "1e3"])
def test_a_bad_target_is_refused(text, capsys):
    assert train.main(["--estimate", text] if text[:1] != "-" else [f"--estimate={text}"]) == train.EXIT_USAGE
    assert f"estimate must be RANKS or RANKSxGB, such as 8 or 8x80GB, got {text!r}" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A model's folder with config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(PAPER_MODELS["Qwen/Qwen2-7B-Instruct"]))
    return str(tmp_path)


def test_the_command_reads_config_json_alone(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "paper_countdown", "--model_name_or_path", folder]
    assert train.main([*options, "--estimate", "8x80GB"]) == train.EXIT_OK
    printed = capsys.readouterr().out
    assert "7.62 billion parameters; bfloat16 on cuda, 8 ranks, fsdp" in printed
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    memory = estimate.per_rank(build_config(options), SEVEN, ranks=8, parallel="fsdp")
    for name in memory.KEPT:
        assert lines[name] == [f"{getattr(memory, name) / GB:.2f}"] * 2
    assert lines["total"][1] == f"{memory.total / GB:.2f}"
    assert "of 80 GB on cuda" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # no run directory


def build_config(options):
    from grpo.config import parse

    return parse([*options, "--device", "cuda", "--dtype", "bfloat16"])


def test_the_command_without_a_value_is_about_this_machine(folder, capsys, monkeypatch):
    monkeypatch.setattr(build, "device_memory", lambda device, processes=1: 16 * GB / processes)
    options = ["--model_name_or_path", folder, "--device", "cpu", "--dtype", "float32"]
    assert train.main([*options, "--estimate"]) == train.EXIT_OK
    assert "float32 on cpu, 1 rank" in (printed := capsys.readouterr().out) and "16 GB on cpu" in printed
    assert train.main([*options, "--estimate", "4"]) == train.EXIT_OK
    assert "4 ranks" in (printed := capsys.readouterr().out) and "4 GB on cpu" in printed


def test_a_missing_config_is_one_line(tmp_path, capsys):
    assert train.main(["--model_name_or_path", str(tmp_path), "--estimate", "1x80GB"]) == train.EXIT_USAGE
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/config.json does not exist; a model folder needs it\n"
    )


def test_a_run_that_cannot_fit_ends_before_anything_is_loaded(folder, capsys, monkeypatch, tmp_path):
    def load(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(weights, "load", load)
    monkeypatch.setattr(build, "device_memory", lambda device, processes=1: 8 * GB)
    options = ["--model_name_or_path", folder, "--device", "cpu", "--dtype", "bfloat16"]
    status = train.main([*options, "--output_dir", str(tmp_path / "runs")])
    assert status == train.EXIT_USAGE
    assert "and cpu has 8 GB" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(("gigabytes", "mode"), [(200, "replicate"), (80, "fsdp")])
def test_several_ranks_resolve_auto_before_anything_is_loaded(folder, capsys, monkeypatch, gigabytes, mode):
    monkeypatch.setattr(build.distributed, "size", lambda: 8)
    monkeypatch.setattr(build.distributed, "on_main", lambda work: work())
    monkeypatch.setattr(build, "device_memory", lambda device, processes=1: gigabytes * GB)
    config = Config(model_name_or_path=folder, device="cpu", dtype="bfloat16", max_rows=8)
    build.check_memory(config)
    assert config.parallel == mode
    assert capsys.readouterr().out.startswith(f"parallel: {mode}; replicate would need ")


def test_device_memory_of_a_cpu_is_divided_among_its_processes():
    assert build.device_memory("cpu", 2) == build.device_memory("cpu") / 2 > 0


def test_the_page_about_scale_has_the_tables_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import estimate as benchmark

    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert all(benchmark.paper_table(preset) in page for preset in benchmark.PRESETS)


# --- where the sizes come from ----------------------------------------------------------------------------


def test_architecture_of_an_adapter_is_its_bases(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folder}))
    assert weights.architecture(adapter) == weights.architecture(folder)
    assert weights.architecture(folder).hidden_size == SEVEN.hidden_size


def test_a_config_with_too_many_layers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 10**12}))
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000000"):
        weights.architecture(tmp_path)
