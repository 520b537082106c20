"""The decoder against transformers, the oracle: every family, RoPE variant and window, on random weights."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from grpo.logprob import plain_logprob
from grpo.model import weights
from grpo.model.attention import causal_attend
from grpo.model.decoder import Decoder, Linear, ModelConfig
from grpo.model.rope import Rope, frequencies

# Odd sizes, so that a mixed-up dimension cannot fit: 3 query heads per key head, and no two sizes alike.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # large: attention far from uniform, every part shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-groups": ("Llama", {"num_key_value_heads": 6}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("Llama", {"head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-window-unused": (
        "Qwen2",
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-biases": ("Qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 6}),
    "phi3-partial": ("Phi3", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "phi3-longrope-short": ("Phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 40}),
    "phi3-longrope-long": ("Phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8}),
    "rope-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "rope-linear-v4": ("Llama", {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "rope-dynamic-short": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "rope-dynamic-long": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12},
    ),
    "rope-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "rope-yarn-untruncated": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"truncate": False}}),
    "rope-yarn-factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 4.0}}),
    "rope-yarn-mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}}),
    "rope-llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
}


def oracle(name, tmp_path, dtype=torch.float32):
    """transformers' model, ours loaded from what it saved, and ids: 20 tokens, longer than each window."""
    family, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a missing one
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = weights.load_model(tmp_path, dtype)
    return theirs, ours, torch.randint(3, SIZES["vocab_size"], (2, 20))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, tmp_path):
    theirs, ours, ids = oracle(name, tmp_path)
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours.logits(ours(ids)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-biases", "phi3-partial"])
@torch.no_grad()
def test_bfloat16_is_no_worse_than_transformers(name, tmp_path):
    theirs, ours, ids = oracle(name, tmp_path, torch.bfloat16)
    truth = theirs.double()(ids).logits  # the same rounded weights
    theirs = theirs.bfloat16()
    ours_error = (ours.logits(ours(ids)) - truth).square().mean().sqrt()
    theirs_error = (theirs(ids).logits - truth).square().mean().sqrt()
    assert ours(ids).dtype == torch.bfloat16
    assert ours_error < 1.5 * theirs_error


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-layer-types", "rope-dynamic-long"])
@torch.no_grad()
def test_padding_on_either_side_moves_nothing(name, tmp_path):
    _, ours, ids = oracle(name, tmp_path, torch.float64)  # some CPUs round float32 products by their shape
    expected = ours.logits(ours(ids[:, :13]))
    for left in (0, 3, 7):
        padded = F.pad(ids[:, :13], (left, 7 - left), value=5)
        mask = F.pad(torch.ones(2, 13, dtype=torch.bool), (left, 7 - left))
        logits = ours.logits(ours(padded, attention_mask=mask))
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[:, left : left + 13], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_packed_rows_equal_single_rows(name, tmp_path):
    """Two texts in one row, positions restarted, kept apart by a 4-D mask."""
    _, ours, ids = oracle(name, tmp_path)
    expected = torch.cat([ours(ids[:1, :8]), ours(ids[1:, :12])], dim=1)
    mask = torch.block_diag(torch.ones(8, 8).tril(), torch.ones(12, 12).tril()).bool()
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = torch.cat([ids[:1, :8], ids[1:, :12]], dim=1)
    torch.testing.assert_close(ours(packed, positions, mask[None, None]), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_attend_receives_what_the_contract_says(tmp_path):
    """A hand-written attention that scales, repeats heads and masks itself reproduces the default."""
    _, ours, ids = oracle("qwen2-window", tmp_path)
    config, seen = ours.config, []

    def attend(layer, q, k, v):
        seen.append(layer)
        assert q.shape == (2, 6, 20, 8) and k.shape == v.shape == (2, 2, 20, 8)
        scores = q @ k.repeat_interleave(3, 1).transpose(2, 3) / 8**0.5
        back = torch.arange(20)[:, None] - torch.arange(20)
        window = config.windows[layer] or 20
        scores = scores.masked_fill((back < 0) | (back >= window), -torch.inf)
        return scores.softmax(-1) @ v.repeat_interleave(3, 1)

    torch.testing.assert_close(ours(ids, attend=attend), ours(ids), atol=1e-5, rtol=0)
    assert seen == [0, 1, 2] and config.windows == (None, 4, 4)


def test_gradients_equal_transformers(tmp_path):
    theirs, ours, ids = oracle("qwen3-biases", tmp_path)
    labels = F.pad(ids[:, 1:], (0, 1), value=0)
    for logits in (theirs(ids).logits, ours.logits(ours(ids))):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        rows = weights.layout(ours.config)[name]
        mine = grads[rows.parameter][rows.start : rows.stop]
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_lm_head_is_the_output_embedding_as_in_transformers(name, tmp_path):
    theirs, ours, ids = oracle(name, tmp_path)
    assert ours.lm_head.weight is ours.output_weight
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == ours.config.tie_word_embeddings
    assert ("lm_head.weight" in ours.state_dict()) == (not ours.config.tie_word_embeddings)
    torch.testing.assert_close(ours.lm_head(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
    ours.lm_head(ours(ids)).sum().backward()
    assert ours.output_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_logprobs_pass_gradients_through_selected_tokens_only(gradient_checkpointing, tmp_path):
    _, ours, ids = oracle("llama-tied", tmp_path, torch.float64)
    select = torch.tensor([3, 8, 20 + 5])
    targets = ids.flatten()[select + 1]

    hidden = ours(ids, torch.arange(20)[None], gradient_checkpointing=gradient_checkpointing)
    logprobs = plain_logprob(hidden.flatten(0, 1)[select], ours.output_weight, targets, 0.7)
    expected = (ours.logits(ours(ids)) / 0.7).log_softmax(-1).flatten(0, 1)[select, targets]
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)
    logprobs.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in ours.parameters())
    gradient = ours.layers[0].qkv_proj.weight.grad.clone()
    ours.zero_grad()
    expected.sum().backward()
    torch.testing.assert_close(ours.layers[0].qkv_proj.weight.grad, gradient, atol=1e-6, rtol=0)


def test_inference_mode_leaves_nothing_that_breaks_training(tmp_path):
    """Cached RoPE frequencies made under inference mode must not be saved for a backward pass."""
    _, ours, ids = oracle("rope-llama3", tmp_path)
    frequencies.cache_clear()
    with torch.inference_mode():
        ours(ids)
    ours(ids).sum().backward()


def test_dynamic_rope_forgets_a_longer_text(tmp_path):
    _, ours, ids = oracle("rope-dynamic-long", tmp_path)
    before = ours(ids[:, :15])
    ours(ids)
    torch.testing.assert_close(ours(ids[:, :15]), before, rtol=0, atol=0)


def hf_config(**changes):
    return SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6} | changes


def test_from_hf_reads_old_and_new_rope_alike():
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = ModelConfig.from_hf(hf_config(rope_theta=500.0, rope_scaling=scaling))
    new = ModelConfig.from_hf(hf_config(rope_parameters=scaling | {"rope_theta": 500.0}))
    assert old == new and old.rope.theta == 500.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of .*'gpt2'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of .*'spiral'"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_type must be one of .*'mrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat dict"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor must hold 4 numbers"),
        (
            {"rope_parameters": LONGROPE | {"long_factor": 2.0}},
            "long_factor must be a list .*, got 2.0",
        ),
        ({"rope_parameters": LONGROPE | {"short_factor": [0, 1, 1, 1]}}, "short_factor must be .*, got 0"),
        ({"rope_parameters": "default"}, "rope_parameters must be a dict, got 'default'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type must be one of .*\['yarn'\]"),
        ({"rope_parameters": YARN | {"factor": 0}}, r"factor must be a number from 1e-12 to 1e\+12, got 0"),
        ({"rope_parameters": YARN | {"factor": float("nan")}}, "factor must be a number .*, got nan"),
        ({"rope_parameters": YARN | {"factor": "4"}}, "factor must be a number .*, got '4'"),
        ({"rope_parameters": YARN | {"beta_fast": True}}, "beta_fast must be a number .*, got True"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate must be true or false, got 'no'"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor must be .* 1 and 1",
        ),
        ({"rope_theta": 0}, r"rope_theta must be a number from 2 to 1e\+12, got 0"),
        ({"partial_rotary_factor": 10**12}, "partial_rotary_factor must be .* to 1, got 1000000000000"),
        ({"original_max_position_embeddings": 32.0}, "original_max_position_embeddings must be an integer"),
        ({"head_dim": 10**12}, "head_dim must be a number from 2 to 65536"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, "must be above 2"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"num_key_value_heads": 4}, "multiple of 4 key/value heads, got 6"),
        ({"rms_norm_eps": None}, "must have rms_norm_eps"),
        ({"head_dim": 7}, "must be even"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must have 3 entries"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, "got .*linear_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ],
)
def test_from_hf_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_config(**changes))


def test_forward_refuses_wrong_arguments():
    model = Decoder(ModelConfig.from_hf(hf_config()))
    ids = torch.ones(2, 5, dtype=torch.int64)
    attend = causal_attend(model.config.windows, torch.arange(5)[None])
    for arguments, message in [
        ({"input_ids": ids[0]}, r"input_ids must be \(R, T\)"),
        ({"input_ids": ids, "position_ids": torch.arange(4)[None]}, r"position_ids must be \(2, 5\)"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 5)}, "attention_mask must be bool"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 4, dtype=torch.bool)}, "with T = 5"),
        ({"input_ids": ids, "attention_mask": ids.bool(), "attend": attend}, "attention_mask must be None"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_frequencies_are_cached_by_value():
    rope = Rope.from_hf(hf_config(), 8)
    assert frequencies(rope, 0)[0] is frequencies(Rope.from_hf(hf_config(), 8), 0)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (2, 5), (1, 64), (1, 1)])
def test_linear_in_inference_is_the_plain_product(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear(48, 40, bias=bias).bfloat16()
    x = torch.randn(*shape, 48).bfloat16()
    expected = torch.nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    with torch.inference_mode():
        fast = linear(x)
    assert fast.shape == expected.shape and fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.double(), expected, rtol=2**-7, atol=2**-7)
