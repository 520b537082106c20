"""The eight models that the paper trains (arXiv 2505.24726), by the sizes in their published config.json.

The paper names Palmyra 1.7B without publishing its sizes: these are of Writer's palmyra-mini, which is
Qwen2.5-1.5B with an output embedding of its own.
"""

from typing import Any


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        **more,
    }


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_PHI = {"model_type": "phi3", "vocab_size": 32064, "max_position_embeddings": 131072}

PAPER_MODELS = {
    "Qwen/Qwen2-1.5B-Instruct": _sizes(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _sizes(1536, 8960, 28, 12, 2),
    "Palmyra 1.7B": _sizes(1536, 8960, 28, 12, 2, tie_word_embeddings=False),
    "Qwen/Qwen2.5-3B-Instruct": _sizes(2048, 11008, 36, 16, 2),
    "meta-llama/Llama-3.2-3B-Instruct": _sizes(3072, 8192, 28, 24, 8, **_LLAMA),
    "microsoft/Phi-3.5-mini-instruct": _sizes(3072, 8192, 32, 32, 32, tie_word_embeddings=False, **_PHI),
    "Qwen/Qwen2-7B-Instruct": _sizes(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "meta-llama/Llama-3.1-8B-Instruct": _sizes(4096, 14336, 32, 32, 8, tie_word_embeddings=False, **_LLAMA),
}
