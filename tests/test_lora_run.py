"""LoRA in a run: what is trained, saved and measured, the reference, the warm start, resume, and refusals."""

import copy
import json
import signal
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from ranks import together
from test_resume import SAMPLING
from tiny_run import Moment, arguments, contents, records, run, run_and_stop, save_model

import train
from grpo import export, interact
from grpo.evaluate import __main__ as evaluate
from grpo.learner.learner import Learner
from grpo.model import lora, weights
from grpo.run import build, checkpoint
from grpo.run.state import RunState
from grpo.sampler.engine import Sampler

SETTINGS = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "warm_start_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    done = run(arguments(model, tmp_path_factory.mktemp("runs"), **SETTINGS))
    assert done.status == 0, done.err
    return done.folder


def newest(folder):
    return max((folder / "checkpoints").glob("step-*"))


def with_adapter(parts, seed=0, **changes):
    """The parts with an adapter whose B is not zero."""
    adapter = lora.fresh(parts.model.config, **{"r": 3, "lora_alpha": 6.0, "seed": seed, **changes})
    lora.add(parts.model, adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for low in lora.adapter_of(parts.model).values():
            low.b.copy_(torch.randn(low.b.shape, generator=generator) / 8)
    return parts


# --- one update -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    return with_adapter(tiny.build(retries_per_reflection=1))


@pytest.fixture(scope="module")
def episodes(parts):
    return tiny.episodes(parts)


@pytest.mark.parametrize("train_on", ["reflection", "all"])
def test_packed_gradients_equal_padded_ones(parts, episodes, train_on):
    """float64: the learner's trees against grpo/reference.py, padded rows in plain PyTorch."""
    expected = tiny.naive(parts, episodes, train_on=train_on)
    _, gradients, _ = tiny.update(parts, episodes, dtype=torch.float64, train_on=train_on)
    assert len(gradients) == 2 * 11 and all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-9 * expected[name].norm(), name
    assert {name for name, gradient in expected.items() if gradient is not None} == set(gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens_per_micro_batch": 60},
        {"gradient_checkpointing": True},
        {"importance_sampling_level": "sequence"},
        {"num_iterations": 2},
    ],
    ids=str,
)
def test_splits_and_options_leave_the_gradient_as_it_is(parts, episodes, settings):
    """At the first update the ratio is 1, so that both levels have the gradient of the policy."""
    same = {"beta": 0.0, "learning_rate": 0.0, "dtype": torch.float64}
    _, gradients, _ = tiny.update(parts, episodes, **same)
    _, others, _ = tiny.update(parts, episodes, **same, **settings)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_moves_and_small_updates_are_not_lost(parts, episodes, dtype):
    """A step of 1e-6 changes no bfloat16 weight of the adapter, but its float32 master."""
    model = copy.deepcopy(parts.model).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = tiny.learner(replace(parts, model=model, config=replace(parts.config, learning_rate=1e-6)))
    masters = {name: master.clone() for name, master in learner.optimizer.masters.items()}
    learner.step(copy.deepcopy(episodes))
    assert all("lora_" in name for name in masters)
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            change = (learner.optimizer.masters[name].detach() - masters[name]).abs()
            assert learner.optimizer.masters[name].dtype == torch.float32
            assert 1e-7 < change.max() < 2e-6 and tensor.dtype == dtype
        else:
            assert torch.equal(tensor, before[name]), name


def test_the_reference_is_the_model_without_its_adapter(parts, episodes):
    """As a model of its own with the same weights, bit for bit."""
    config = replace(parts.config, beta=0.1)

    def step(separate):
        model = copy.deepcopy(parts.model)
        reference = model
        if separate:
            lora.remove(reference := copy.deepcopy(model))
        learner = Learner(model, config, total_steps=3, reference=reference)
        return [learner.step(copy.deepcopy(episodes)) for _ in range(2)], model.state_dict()

    (metrics, state), (others, other_state) = step(separate=True), step(separate=False)
    assert metrics == others and metrics[0]["kl"] > 0.01
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_adds_the_adapter_as_the_learner_does(parts, dtype):
    """With packed weights on a CPU: log-probs are the learner's, and `load_weights` takes a new adapter."""
    model = copy.deepcopy(parts.model).to(dtype)
    sampler = Sampler(model, stop_token_ids=parts.chat.stop_token_ids, temperature=parts.config.temperature)
    rollout = build.build_rollout(parts.config, sampler, parts.task, parts.chat)
    mine = replace(parts, model=model, sampler=sampler, rollout=rollout, dtype=dtype)
    episodes = tiny.episodes(mine, tiny.failures(parts, 3))
    metrics = tiny.learner(mine).step(episodes)
    # The sampler's and the learner's sums are rounded in another order; bfloat16 has 8 bits.
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert 0 <= metrics["sampling/sampling_logp_difference/mean"] < bound
    other = copy.deepcopy(model)
    with torch.no_grad():
        for low in lora.adapter_of(other).values():
            low.b.neg_()
    sampler.load_weights(other.state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


# --- a whole run ------------------------------------------------------------------------------------------


def test_checkpoints_are_adapters_for_peft_and_the_start_is_whole(finished):
    assert sorted(path.name for path in newest(finished).iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "trainer"),
    ]
    assert (finished / "start/model.safetensors").exists()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(newest(finished))
    ours, _ = weights.load(newest(finished), merge=False)
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
    start, _ = weights.load(finished / "start")
    assert not torch.allclose(ours.logits(ours(ids)), start.logits(start(ids)), atol=0.01)
    lora.remove(ours)  # its base is start/, byte for byte
    assert all(torch.equal(start.state_dict()[name], t) for name, t in ours.state_dict().items())
    updates = [line for line in records(finished) if "reward" in line]
    assert len(updates) == 4 and updates[-1]["kl"] > 0 and any(line["grad_norm"] > 0 for line in updates)
    assert max(line["sampling/sampling_logp_difference/mean"] for line in updates) < 1e-5


def test_the_state_of_the_optimiser_has_the_adapter_s_size(finished, model, tmp_path):
    tensors, _ = checkpoint.load(newest(finished))
    adapter = weights.load(newest(finished), merge=False)[0]
    trained = {name for name, _ in adapter.named_parameters() if "lora_" in name}
    assert set(tensors) == {
        f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in trained
    }
    done = run(arguments(model, tmp_path, **SETTINGS, max_steps=1, num_eval=0, eval_steps=0))
    sizes = [path.stat().st_size for path in done.folder.rglob("*.safetensors")]
    (line,) = [line for line in done.out.splitlines() if line.startswith("disk: ")]
    assert float(line.split()[1]) == pytest.approx(sum(sizes) / 1e9, rel=0.1)  # start/, adapter and trainer/


def test_a_warm_start_is_merged_and_rl_begins_with_a_fresh_adapter(model, tmp_path, monkeypatch):
    save_start, begin = RunState.save_start, Learner.__init__
    seen = {}

    def before_merging(self):
        seen["warm"] = {name: low.product() for name, low in lora.adapter_of(self.parts.model).items()}
        save_start(self)

    def created(self, model, *args, **options):
        seen["fresh"] = copy.deepcopy(lora.adapter_of(model))
        begin(self, model, *args, **options)

    monkeypatch.setattr(RunState, "save_start", before_merging)
    monkeypatch.setattr(Learner, "__init__", created)
    done = run(arguments(model, tmp_path, **SETTINGS, max_steps=1, num_eval=0, eval_steps=0))
    assert done.status == 0, done.err
    source = weights.hf_tensors(weights.load(model)[0])
    start, _ = weights.load(done.folder / "start")
    moved = 0
    for name, tensor in weights.hf_tensors(start).items():
        product = seen["warm"].get(name.removesuffix(".weight"))
        moved += product is not None and bool(product.any())
        assert torch.equal(tensor, source[name] if product is None else source[name] + product), name
    assert moved == 14
    config = start.config
    for name, low in lora.fresh(config, r=4, lora_alpha=8.0, seed=42).items():
        assert torch.equal(seen["fresh"][name].a, low.a) and not seen["fresh"][name].b.any()


KILLS = {
    "during the warm start": Moment("grpo.learner.learner:Learner.supervised_step", call=3),
    "in a rollout": Moment(SAMPLING, call=10, after='{"step": 2, "validation'),
    "in a checkpoint": Moment("grpo.run.checkpoint:_write_state", after='{"step": 3'),
}


@pytest.mark.parametrize("moment", KILLS.values(), ids=KILLS.keys())
def test_killed_and_resumed(model, tmp_path, finished, moment):
    status, _ = run_and_stop(arguments(model, tmp_path, **SETTINGS), moment, signal.SIGKILL)
    assert status == -signal.SIGKILL
    done = run(["--resume", str(tmp_path / finished.name)])
    assert done.status == 0, done.err
    expected, found = contents(finished), contents(tmp_path / finished.name)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_two_ranks_train_an_adapter_and_continue(model, tmp_path, parallel):
    """Right after resuming, too, the sampler has the learner's adapter."""
    few = {"warm_start_steps": 1, "max_steps": 2, "num_eval": 0, "eval_steps": 0, "parallel": parallel}
    assert together(2, train.main, arguments(model, tmp_path, **SETTINGS, **few)) == [0, 0]
    folder = tmp_path / "tiny-001"
    assert together(2, train.main, ["--resume", str(folder), "--max_steps", "3"]) == [0, 0]
    updates = [line for line in records(folder) if "reward" in line]
    differences = [line["sampling/sampling_logp_difference/mean"] for line in updates]
    assert len(differences) == 3 and max(differences) < 1e-5
    adapter = lora.adapter_of(weights.load(newest(folder), merge=False)[0])
    assert len(adapter) == 14 and all(low.b.any() for low in adapter.values())


def test_a_moved_run_finds_its_start(finished, tmp_path, capsys):
    """The commands measure, export and talk to an adapter; evaluation gives the run's own numbers."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in finished.rglob("*"):
        if path.is_file() and path.name != ".lock":
            target = moved / path.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    last = newest(moved)
    assert weights.base_of(last) == moved / "start"
    identity = evaluate.MeasuredModel("", str(last)).identity()  # changes with the adapter and with its base
    assert " adapter_model.safetensors:" in identity and " model.safetensors:" in identity
    assert evaluate.main([str(last), "--output", str(tmp_path / "result.json")]) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["models"][last.name]
    assert measured == json.loads((finished / "evaluation.json").read_text())["models"]["trained"]
    assert export.main([str(moved), "--to", str(tmp_path / "merged")]) == 0
    exported, merged = weights.load(tmp_path / "merged")[0], weights.load(last)[0]
    assert all(torch.equal(merged.state_dict()[name], t) for name, t in exported.state_dict().items())
    assert not (tmp_path / "merged" / lora.CONFIG).exists()
    capsys.readouterr()
    parts = interact.open_model(interact.parser().parse_args([str(moved)]), [])
    assert lora.adapter_of(parts.model)  # not merged


def test_a_run_begins_on_an_adapter(finished, tmp_path):
    """Of another run or of PEFT: merged, in float32 and rounded once. With LoRA, a fresh adapter on top."""
    few = {"max_steps": 1, "num_eval": 4, "eval_steps": 0, "warm_start_steps": 0}
    merged = weights.load(newest(finished))[0].state_dict()
    for name, settings in (("full", {}), ("lora", {**SETTINGS, "lora_target_modules": "q_proj,v_proj"})):
        done = run(arguments(newest(finished), tmp_path / name, **few, **settings))
        assert done.status == 0, done.err
        start = weights.load(done.folder / "start")[0].state_dict()
        assert start.keys() == merged.keys()
        assert all(torch.equal(start[key], tensor) for key, tensor in merged.items())
        files = json.loads((done.folder / "inputs.json").read_text())["model"]
        assert {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= set(files)
    adapter = weights.load(newest(done.folder), merge=False)[0]
    assert {module.rpartition(".")[2] for module in lora.adapter_of(adapter)} == {"q_proj", "v_proj"}


# --- settings that do not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_target_modules": "q_proj,qproj"},
            "lora_target_modules must be all-linear, or some of q_proj",
        ),
        ({"lora_target_modules": "none"}, "gate_up_proj, got 'none'"),
        ({"lora_r": -1}, "lora_r must be at least 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"lora_r": 2, "lora_target_modules": "qkv_proj"}, "down_proj for a llama model, got 'qkv_proj'"),
    ],
    ids=str,
)
def test_settings_are_refused_in_one_line(model, tmp_path, settings, message):
    done = run(arguments(model, tmp_path, **settings))
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_or_without_an_adapter_is_refused(model, tmp_path, finished):
    done = run(["--resume", str(finished), "--lora_r", "0"])
    assert done.status == 2 and "resume of" in done.err and "lora_r: 4 -> 0. Start a new run" in done.err
    full = run(arguments(model, tmp_path, max_steps=1, num_eval=0, eval_steps=0))
    done = run(["--resume", str(full.folder), "--lora_r", "4"])
    assert done.status == 2 and "changed settings: lora_r: 0 -> 4. Start a new run" in done.err


def test_an_adapter_of_another_base_is_refused(finished, tmp_path):
    other = tmp_path / "other"
    tokenizer = tiny.byte_tokenizer(template=tiny.CHATML)
    wide = tiny.decoder(len(tokenizer), hidden_size=64)
    wide.source = weights.Source({**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "hidden_size": 64})
    weights.save(wide, tokenizer, other)
    adapter, tokenizer = weights.load(newest(finished), merge=False)
    weights.save_adapter(adapter, tokenizer, tmp_path / "adapter", str(other))
    done = run(arguments(tmp_path / "adapter", tmp_path / "runs"))
    assert done.status == 2 and "does not fit its base: lora_B of" in done.err and done.err.count("\n") == 1


def test_a_start_is_reused_where_the_adapter_does_not_matter(model, tmp_path):
    """Before RL a fresh adapter changes nothing; a warm start trains it."""
    few = {"max_steps": 1, "num_eval": 0, "eval_steps": 0, "start_from": "auto"}
    first = run(arguments(model, tmp_path / "a", **few, warm_start_steps=0))
    second = run(arguments(model, tmp_path / "a", **few, warm_start_steps=0, lora_r=2))
    assert second.status == 0 and f"taken from {first.folder}, which computed the same" in second.out
    trained = run(arguments(model, tmp_path / "b", **few, lora_r=2))
    same = run(arguments(model, tmp_path / "b", **few, lora_r=2, lora_target_modules="all-linear"))
    assert "taken from" not in trained.out and f"taken from {trained.folder}" in same.out
    other = run(arguments(model, tmp_path / "b", **{**few, "start_from": trained.folder}, lora_r=4))
    assert other.status == 2 and "(lora_r: 2 -> 4)" in other.err
