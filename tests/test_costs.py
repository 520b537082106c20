"""What a decode step and an update cost, in counts that no noisy neighbour changes: FLOPs of matrix products,
kernels, bytes allocated, calls of Python. A change that makes any of them grow fails here, on every machine.
"""

import random
import sys
from pathlib import Path

import plain_varlen
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from lib.measure import flops  # noqa: E402

from grpo.learner.packing import pack_sequences  # noqa: E402
from grpo.learner.tree_attention import tree_attend  # noqa: E402
from grpo.model.decoder import Decoder, ModelConfig  # noqa: E402
from grpo.sampler.engine import Row, Sample, Sampler  # noqa: E402
from grpo.sampler.kv_cache import CachedAttention, RowSpan, SlotCache  # noqa: E402

VOCABULARY, PROMPT, NEW, ROWS, SHARE = 1000, 40, 20, 16, 8
NEVER = 10**6  # a stop token that cannot come: every row samples all its tokens


def decoder(num_layers=2, vocab_size=VOCABULARY):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": num_layers}
    return Decoder(ModelConfig.from_hf({**tiny.HF_CONFIG, **sizes})).eval()


def rows(count=ROWS, new=NEW):
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(PROMPT)) for _ in range(count // SHARE)]
    return [Row(prompts[i // SHARE], [Sample(new, key=(i,))]) for i in range(count)]


def layer_weights(model):
    """Numbers in the matrices of all layers: each costs 2 FLOPs per token."""
    return sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)


def products(counted):
    """FLOPs of all products with weights, packed (grpo/model/decoder.py) or not."""
    return sum(counted.get(name, 0) for name in ("aten.mm", "mkldnn._linear_pointwise"))


def allocated_bytes(call):
    """All bytes ever allocated during the call, whether freed or not."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())


def python_calls(call):
    """Calls of Python functions and of built-in ones."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


class Kernels(TorchDispatchMode):
    """The names of all operations that a GPU would launch a kernel for: no views, no allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("_unsafe_view", "empty", "new_empty", "detach"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def attention(self):
        """How many are calls of an attention function, not of its backward pass."""
        return sum(("attention" in name or "attn" in name) and "backward" not in name for name in self.names)


def test_sampling_multiplies_each_token_once_and_a_shared_prompt_once():
    model = decoder()
    sampler = Sampler(model, stop_token_ids=[NEVER])
    sampler.run(rows(SHARE, 1))  # whether weights can be packed is tried once, with a small product
    counted = flops(lambda: sampler.run(rows()))
    sampled, prompts = ROWS * NEW, ROWS // SHARE * (PROMPT - 1)  # a prompt's last token is each row's first
    head = 2 * model.output_weight.numel() * sampled
    assert products(counted) == 2 * layer_weights(model) * (sampled + prompts) + head
    # Scores and sums, for the prompt's keys and the row's own so far: no row attends to another's.
    config = model.config
    keys = ROWS * sum(PROMPT - 1 + sampled for sampled in range(1, NEW + 1))
    assert counted["aten.bmm"] == config.num_layers * 4 * config.num_heads * config.head_dim * keys
    attention = {"aten.bmm", "aten._scaled_dot_product_flash_attention_for_cpu"}
    assert counted.keys() <= {"aten.mm", "mkldnn._linear_pointwise", *attention}


def test_rows_that_are_done_cost_nothing():
    """16 rows of which 12 end after 2 tokens: the products of 4 rows from then on."""
    model = decoder()
    lengths = [2] * 12 + [NEW] * 4
    work = [
        Row(row.prefix, [Sample(n, key=(n, i))])
        for i, (row, n) in enumerate(zip(rows(), lengths, strict=True))
    ]
    sampler = Sampler(model, stop_token_ids=[NEVER])
    sampler.run(rows(SHARE, 1))  # as above
    counted = products(flops(lambda: sampler.run(work)))
    tokens = sum(lengths) + ROWS // SHARE * (PROMPT - 1)
    head = 2 * model.output_weight.numel() * sum(lengths)
    assert counted == 2 * layer_weights(model) * tokens + head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_step_writes_no_second_copy_of_the_logits(dtype):
    """Neither softmax nor running sums of (V, B): a larger vocabulary adds little to what is allocated."""
    per_step = []
    for vocabulary in (VOCABULARY, 10 * VOCABULARY):
        model = decoder(vocab_size=vocabulary).to(dtype)
        sampler = Sampler(model, stop_token_ids=[NEVER])
        sampler.run(rows(new=8))  # the logits' own buffer comes with the first run and stays
        # What a run allocates once, packed weights among it, is the same in both.
        short, long = (allocated_bytes(lambda s=sampler, n=n: s.run(rows(new=n))) for n in (4, 8))
        per_step.append((long - short) / 4)
    logits = 9 * VOCABULARY * ROWS * 4
    assert per_step[1] - per_step[0] < 0.05 * logits


def test_python_calls_of_a_decode_step():
    """70 calls and as many built-in ones for a layer, 8 and 12 for a row: bounds just above what it is."""

    def per_step(num_layers, count):
        sampler = Sampler(decoder(num_layers), stop_token_ids=[NEVER])
        short, long = (python_calls(lambda n=n: sampler.run(rows(count, n))) for n in (10, 30))
        return (long - short) / 20

    base, deeper, wider = per_step(2, 8), per_step(4, 8), per_step(2, 64)
    assert (deeper - base) / 2 < 190, "for a layer"
    assert (wider - base) / 56 < 22, "for a row"
    assert base < 740


def test_python_calls_of_packing():
    """Each token goes into one trie and one list: bounds just above what it is."""

    def calls(length):
        rng = random.Random(0)

        def ids(count):
            return [rng.randrange(VOCABULARY) for _ in range(count)]

        groups = [(ids(PROMPT), [(ids(length), [True] * length) for _ in range(8)]) for _ in range(8)]
        return python_calls(lambda: pack_sequences(groups, max_tokens=10**5))

    assert (calls(60) - calls(20)) / (8 * 8 * 40) < 12  # 29 if tries are built for counting


def test_an_update_multiplies_a_shared_prompt_once():
    """Forward, and twice that backward, for the tokens of the packed rows; nothing is padded."""
    learner = tiny.learner(tiny.build())
    model = learner.model
    completions, length = 8, 6
    prompt = [1 + i for i in range(PROMPT)]
    shared = 2 * (length // 3)  # what two siblings begin with in common
    branches = [
        ([5 + i // 2] * shared + [50 + i] * (length - shared), [True] * length) for i in range(completions)
    ]
    packed = pack_sequences([(prompt, branches)], max_tokens=1000)
    selected = completions * length - shared * completions // 2
    tokens = PROMPT + selected - completions  # each completion's last token predicts nothing
    assert [batch.num_tokens for batch in packed] == [tokens]
    counted = flops(lambda: learner.supervised_step([(prompt, branches)], 1e-3))
    in_all = sum(count for name, count in counted.items() if "mm" in name and "bmm" not in name)
    # The logits are multiplied out twice (forward, and again in the backward pass), then the two gradients.
    head = 8 * model.output_weight.numel() * selected
    assert in_all == 6 * layer_weights(model) * tokens + head


def test_attention_calls_of_an_update():
    """8 groups of 8: a call for each prompt and each bundle of similar length, or one call for all."""
    rng, lengths = random.Random(0), (40, 36, 28, 24, 18, 16, 10, 8)  # four bundles
    groups = [
        ([rng.randrange(VOCABULARY) for _ in range(PROMPT)],
         [([rng.randrange(VOCABULARY) for _ in range(n)], [True] * n) for n in lengths])
        for _ in range(8)
    ]  # fmt: skip
    (batch,) = pack_sequences(groups, max_tokens=10**4)
    model = decoder()
    with Kernels() as sdpa:
        attend = tree_attend(batch.trees, model.config.windows)
        model(batch.input_ids, batch.position_ids, attend=attend).sum().backward()
    assert sdpa.attention() == 40 * model.config.num_layers
    if not plain_varlen.REAL_FITS:
        return  # PyTorch before 2.12
    # torch's own function runs on the meta device, which computes shapes only.
    model, batch = model.to("meta").bfloat16(), batch.to("meta")
    with Kernels() as varlen:
        attend = tree_attend(batch.trees, model.config.windows, varlen=True)
        model(batch.input_ids, batch.position_ids, attend=attend).sum().backward()
    assert varlen.attention() == varlen.names.count("_varlen_attn_backward") == model.config.num_layers
    q, k = (torch.empty(1, heads, batch.num_tokens, 8, device="meta") for heads in (4, 2))
    with Kernels() as one_layer:
        attend(0, q, k, k)
    assert one_layer.names == ["cat", "embedding", "_varlen_attn"]


def test_attention_calls_of_fed_tokens_and_new_prompts():
    """A call for each row that has several new tokens and for each new prompt, or one call for all."""
    config = decoder().config
    rows = [RowSpan(slot // 4, 9, 5 + slot, 7) for slot in range(8)] + [RowSpan(2, 11, 0, 1)]

    def kernels(device, varlen):
        prefixes, private = (
            SlotCache(config, dtype=torch.bfloat16, device=torch.device(device)) for _ in range(2)
        )
        prefixes.allocate(3, 11)
        private.allocate(9, 32)
        attend = CachedAttention(prefixes, private, rows, [(2, 11)], varlen=varlen)
        tokens = attend.position_ids.shape[1]
        q, k = (
            torch.zeros(1, heads, tokens, config.head_dim, dtype=torch.bfloat16, device=device)
            for heads in (config.num_heads, config.num_kv_heads)
        )
        with torch.inference_mode(), Kernels() as seen:
            assert attend(0, q, k, k).shape == q.shape
        return seen

    assert kernels("cpu", varlen=False).attention() == 9
    if plain_varlen.REAL_FITS:
        together = kernels("meta", varlen=True)
        assert together.attention() == 1
        assert together.names.count("index_put_") == 2 * 4  # new keys and values into the caches, and back
