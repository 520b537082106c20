"""Where each tensor of a Hugging Face folder is in the decoder, whose projections are fused.

Used to load and save whole models (weights.py) and their adapters (lora.py).
"""

from typing import NamedTuple

from grpo.model.decoder import ModelConfig


class Rows(NamedTuple):
    """Where an HF tensor lives: rows [start, stop) of one of the decoder's parameters."""

    parameter: str
    start: int
    stop: int
    columns: int | None = None  # None: a vector

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.stop - self.start
        return (rows,) if self.columns is None else (rows, self.columns)


def layout(config: ModelConfig) -> dict[str, Rows]:
    """Name of each tensor in the HF checkpoint -> the rows of our parameter that hold it."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    fused = config.model_type == "phi3"  # Phi-3 is published fused, in our order
    qkv = {"qkv": q + 2 * kv} if fused else {"q": q, "k": kv, "v": kv}
    gate_up = {"gate_up": 2 * intermediate} if fused else {"gate": intermediate, "up": intermediate}
    table = {
        "model.embed_tokens.weight": Rows("embed_tokens.weight", 0, config.vocab_size, hidden),
        "model.norm.weight": Rows("norm.weight", 0, hidden),
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Rows("lm_head.weight", 0, config.vocab_size, hidden)

    def add(theirs: str, ours: str, sizes: dict[str, int], columns: int | None, bias: bool = False) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            start = 0
            for part, rows in sizes.items():
                place = Rows(f"{ours}.{kind}", start, start + rows, columns if kind == "weight" else None)
                table[f"{theirs.format(part)}.{kind}"] = place
                start += rows

    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        add(theirs + "self_attn.{}_proj", ours + "qkv_proj", qkv, hidden, config.qkv_bias)
        add(theirs + "self_attn.o_proj", ours + "o_proj", {"": hidden}, q, config.o_bias)
        add(theirs + "mlp.{}_proj", ours + "gate_up_proj", gate_up, hidden, config.mlp_bias)
        add(theirs + "mlp.down_proj", ours + "down_proj", {"": hidden}, intermediate, config.mlp_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(theirs + norm, ours + norm, {"": hidden}, None)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            add(theirs + "self_attn." + norm, ours + norm, {"": config.head_dim}, None)
    return table
