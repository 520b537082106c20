"""LoRA against PEFT, the oracle: logits, gradients and files; merging, packed weights, damaged adapters."""

import copy
import json
import math
import shutil

import peft
import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from tiny_model import PHI3, make, write_gguf

from grpo.model import lora, weights
from grpo.model.decoder import packed_weights

IDS = torch.randint(3, 60, (2, 17), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "phi3, fused": ("Phi3", PHI3),
}


def folder_of(path, family="Llama", **options):
    make(family, **options).save_pretrained(path)
    tiny_model.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("model") / "base")


def randomise(model, seed=0):
    """B is zero in a fresh adapter: let it do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def with_adapter(path, dtype=torch.float32, r=3, alpha=6.0, modules=(lora.ALL,)):
    model, tokenizer = weights.load(path, dtype)
    adapter = lora.fresh(model.config, r=r, lora_alpha=alpha, target_modules=modules, seed=5)
    lora.add(model, adapter)
    randomise(model)
    return model, tokenizer


def theirs_of(base, adapter=None, **options):
    """The base in transformers, with PEFT's adapter: that of a folder, or a new one."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, adapter)
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "lora_alpha": 6, **options}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomise(theirs)
    return theirs


@torch.no_grad()
def logits(model):
    return model.logits(model(IDS)) if hasattr(model, "logits") else model(IDS).logits


def assert_close(ours, theirs, bound=1e-5):
    """`bound` is a share of the largest logit: sums in another order round differently."""
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


# --- PEFT reads ours -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_a_saved_adapter_has_the_same_logits_in_peft(tmp_path, family, options):
    base = folder_of(tmp_path / "base", family, **options)
    ours, tokenizer = with_adapter(base)
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert not torch.allclose(logits(ours), logits(weights.load(base)[0]), atol=0.1)
    assert_close(logits(ours), logits(theirs))
    again, _ = weights.load(tmp_path / "adapter", merge=False)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("module", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
def test_each_target_module_alone(tmp_path, base, module):
    ours, tokenizer = with_adapter(base, modules=[module])
    assert {name.rpartition(".")[2] for name in lora.adapter_of(ours)} == {module}
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    assert_close(logits(ours), logits(theirs_of(base, tmp_path / "adapter")))


def test_the_folder_is_complete(tmp_path, base):
    ours, tokenizer = with_adapter(base, modules=["q_proj", "down_proj"])
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj", "down_proj"})
    assert config.base_model_name_or_path == str(base) and config.task_type == "CAUSAL_LM"
    tensors = load_file(tmp_path / "adapter" / lora.TENSORS)
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for letter in "AB"
    }
    assert weights.load_tokenizer(tmp_path / "adapter").chat_template == tokenizer.chat_template
    assert not (tmp_path / "adapter" / "config.json").exists()


# --- ours reads PEFT's -----------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 11}},
    "some layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.0\..*(k_proj|gate_proj)"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_an_adapter_of_peft_has_the_same_logits_here(tmp_path, base, options):
    theirs = theirs_of(base, **options)
    theirs.save_pretrained(tmp_path / "adapter")
    separate, tokenizer = weights.load(tmp_path / "adapter", merge=False)
    merged, _ = weights.load(tmp_path / "adapter")
    assert not lora.adapter_of(merged) and lora.adapter_of(separate)
    assert_close(logits(separate), logits(theirs))
    assert_close(logits(merged), logits(theirs))
    assert tokenizer.get_vocab() == weights.load_tokenizer(base).get_vocab()  # the base's: PEFT saves none


def test_a_gguf_file_as_base(tmp_path):
    write_gguf(tmp_path / "base.gguf", make())
    ours, tokenizer = with_adapter(tmp_path / "base.gguf")
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(tmp_path / "base.gguf"))
    assert_close(logits(weights.load(tmp_path / "adapter")[0]), logits(ours))


# --- the product and its gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_equal_those_of_the_merged_formula(base, gradient_checkpointing):
    """dL/dA = scale B' dL/dW and dL/dB = scale dL/dW A', with W = W0 + scale B A, in float64."""
    ours, _ = with_adapter(base, torch.float64)
    whole = copy.deepcopy(ours)
    lora.merge(whole)
    lora.remove(whole)
    whole.requires_grad_(True)

    def backward(model, **options):
        logprobs = model.logits(model(IDS, **options)).log_softmax(-1)
        logprobs.gather(-1, IDS.roll(-1, 1)[..., None]).mean().backward()

    backward(ours, gradient_checkpointing=gradient_checkpointing)
    assert_close(logits(ours), logits(whole), bound=1e-12)
    backward(whole)
    layers = lora.linear_layers(ours.config)
    seen = 0
    for name, layer in ours.named_modules():
        adapter = getattr(layer, "adapter", None)
        if adapter is None:
            continue
        grad_a = adapter.lora_A.weight.grad.split(adapter.ranks)
        for (part, low), a, lora_b in zip(adapter.low_ranks(), grad_a, adapter.lora_B, strict=True):
            rows = layers[part.module]
            grad = dict(whole.named_parameters())[rows.parameter].grad[rows.start : rows.stop]
            assert rows.parameter == f"{name}.weight"
            for got, expected in (
                (a, low.scale * low.b.T @ grad),
                (lora_b.weight.grad, low.scale * grad @ low.a.T),
            ):
                assert (got - expected).norm() <= 1e-9 * expected.norm()
                seen += 1
    assert seen == 2 * 2 * 7
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_gradients_equal_those_of_peft(tmp_path, base):
    ours, tokenizer = with_adapter(base, torch.float64)
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    theirs = theirs_of(base, tmp_path / "adapter").double()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    theirs.load_state_dict(  # PEFT reads the adapter in float32
        {f"{k.removesuffix('.weight')}.default.weight": v for k, v in lora.peft_tensors(ours).items()},
        strict=False,
    )
    ours.logits(ours(IDS)).square().mean().backward()
    theirs(IDS).logits.square().mean().backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters()}
    adapters = [layer.adapter for layer in ours.modules() if getattr(layer, "adapter", None) is not None]
    for adapter in adapters:
        grad_a = adapter.lora_A.weight.grad.split(adapter.ranks)
        for part, a, lora_b in zip(adapter.parts, grad_a, adapter.lora_B, strict=True):
            for letter, got in (("A", a), ("B", lora_b.weight.grad)):
                other = expected[f"base_model.model.{part.module}.lora_{letter}.weight"]
                # Inside transformers, RMSNorm and the softmax of attention are in float32.
                assert (got - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same(base, dtype):
    ours, _ = with_adapter(base, dtype)
    plain = logits(ours)
    with torch.inference_mode(), packed_weights(ours):
        packed = ours.logits(ours(IDS))
    # bfloat16: two layers of activations, each rounded to 8 bits, in two orders of summation.
    assert_close(packed, plain, {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype])


def test_a_fresh_adapter_changes_nothing_and_is_peft_s(base):
    before, _ = weights.load(base)
    state = torch.random.get_rng_state()
    adapter = lora.fresh(before.config, r=8, lora_alpha=16.0, seed=1)
    ours = copy.deepcopy(before)
    lora.add(ours, adapter)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(ours), logits(before))
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, _ in ours.named_parameters() if "lora_" in name
    }
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=8, target_modules=["down_proj"]))
    expected = next(p for name, p in theirs.named_parameters() if "lora_A" in name)
    a = adapter["model.layers.0.mlp.down_proj"].a
    bound = 1 / math.sqrt(a.shape[1])  # of Kaiming's uniform distribution with a = sqrt(5)
    for matrix in (a, expected):
        assert 0.95 * bound < matrix.abs().max() <= bound
        assert abs(matrix.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    other_seed = lora.fresh(before.config, r=8, lora_alpha=16.0, seed=2)
    assert all(not torch.equal(low.a, other_seed[name].a) for name, low in adapter.items())


def test_switched_off_is_the_base(base):
    before, ours = weights.load(base)[0], with_adapter(base)[0]
    with_it = logits(ours)
    with pytest.raises(KeyError), lora.switched_off(ours):
        assert torch.equal(logits(ours), logits(before))
        raise KeyError
    assert torch.equal(logits(ours), with_it)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once(tmp_path, base, dtype):
    """In the model and while loading: round(W + scale B A), the sum in float32."""
    ours, tokenizer = with_adapter(base, dtype)
    weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    source = weights.hf_tensors(weights.load(base, torch.float32)[0])
    loaded = weights.hf_tensors(weights.load(tmp_path / "adapter", dtype)[0])
    adapter = lora.adapter_of(ours)
    for name, tensor in loaded.items():
        low = adapter.get(name.removesuffix(".weight"))
        expected = source[name] if low is None else source[name] + low.scale * low.b.float() @ low.a.float()
        torch.testing.assert_close(tensor, expected.to(dtype).detach(), rtol=0, atol=2e-7)
    before = {name: tensor.clone() for name, tensor in weights.hf_tensors(ours).items()}
    products = {name: low.product() for name, low in adapter.items()}
    lora.merge(ours)
    for name, tensor in weights.hf_tensors(ours).items():
        product = products.get(name.removesuffix(".weight"))
        expected = before[name] if product is None else (before[name].float() + product).to(dtype)
        assert torch.equal(tensor, expected)
    assert all(not low.b.any() for low in lora.adapter_of(ours).values())  # nothing is added twice


# --- what is refused -------------------------------------------------------------------------------------


def damage(folder, base, kind):
    config = json.loads((folder / lora.CONFIG).read_text())
    tensors = load_file(folder / lora.TENSORS)
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if kind == "base absent":
        config["base_model_name_or_path"] = str(base / "absent")
    elif kind == "no base":
        del config["base_model_name_or_path"]
    elif kind == "Hub base":
        config["base_model_name_or_path"] = "owner/base"
    elif kind == "itself":
        config["base_model_name_or_path"] = str(folder)
    elif kind == "another size":
        tensors[q] = torch.zeros(3, 65)
    elif kind == "another depth":
        tensors[q.replace("layers.0", "layers.9")] = tensors.pop(q)
    elif kind == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(3, 60)
    elif kind == "half":
        del tensors[q]
    elif kind == "rank":
        config["r"] = 4
    elif kind == "alpha":
        config["lora_alpha"] = "six"
    elif kind == "pattern":
        config["rank_pattern"] = {"(a+)+": 2}
    elif kind == "pickled":
        (folder / lora.TENSORS).rename(folder / "adapter_model.bin")
    elif kind == "whole weights too":
        for name in ("config.json", "model.safetensors"):
            shutil.copy(base / name, folder / name)
    else:
        key, value = kind
        config[key] = value
    (folder / lora.CONFIG).write_text(json.dumps(config))
    if kind != "pickled":
        save_file(tensors, folder / lora.TENSORS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("base absent", r"is an adapter \(LoRA\) whose base is missing: .*absent: no such folder"),
        ("no base", "base_model_name_or_path must name the adapter's base, got None"),
        ("Hub base", r"whose base is missing: owner/base is no folder .* Hub download failed"),
        ("itself", "of another adapter, .*: merge that one first"),
        ("another size", r"does not fit its base: lora_A of .*q_proj must be \(3, 64\), got \(3, 65\)"),
        ("another depth", r"does not fit its base, which has no linear layer for .*layers\.9\.self_attn"),
        ("embedding", "no linear layer for base_model.model.model.embed_tokens.lora_embedding_A"),
        ("half", r"lora_A of .*q_proj must be \(3, 64\), got none"),
        ("rank", r"must be \(4, 96\), got \(3, 96\)"),
        ("alpha", "lora_alpha must be a positive number, got 'six'"),
        ("pattern", "rank_pattern must map names of modules to numbers"),
        ("pickled", "adapter_model.safetensors: no weights there .*bin files are not read"),
        ("whole weights too", "has whole weights and an adapter"),
        (("use_dora", True), "only plain LoRA of linear layers can be loaded, got use_dora=True; merge it"),
        (("modules_to_save", ["lm_head"]), r"got modules_to_save=\['lm_head'\]"),
        (("bias", "all"), "got bias='all'"),
        (("init_lora_weights", "pissa"), "got init_lora_weights='pissa'"),
        (("peft_type", "IA3"), "peft_type must be LORA, got 'IA3'"),
    ],
)
def test_a_damaged_or_foreign_adapter(tmp_path, base, kind, message):
    ours, tokenizer = with_adapter(base)
    folder = weights.save_adapter(ours, tokenizer, tmp_path / "adapter", str(base))
    damage(folder, base, kind)
    for merge in (True, False):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            weights.load(folder, merge=merge)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_target_modules(base, tmp_path):
    config = weights.load(base)[0].config
    known = "all-linear, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(ValueError, match=f"must be {known} for a llama model, got 'qproj'"):
        lora.fresh(config, r=2, lora_alpha=2.0, target_modules=["o_proj", "qproj"])
    phi3 = weights.load(folder_of(tmp_path / "phi3", "Phi3", **PHI3))[0].config
    with pytest.raises(ValueError, match="qkv_proj, o_proj, gate_up_proj, down_proj for a phi3 model, got"):
        lora.fresh(phi3, r=2, lora_alpha=2.0, target_modules=["q_proj"])
