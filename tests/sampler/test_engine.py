"""The sampler against a plain forward pass, transformers, and itself in other batches."""

import contextlib
import dataclasses
import re
from collections import Counter
from itertools import pairwise

import plain_varlen
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.model.decoder import Decoder, ModelConfig
from grpo.sampler import batching, cuda_graph, engine, kv_cache
from grpo.sampler.batching import plan
from grpo.sampler.engine import Feed, Row, Sample, Sampler

VOCABULARY = 301
STOPS = tuple(range(0, VOCABULARY, 13))  # about one token in thirteen ends a turn


def make_model(**changes):
    """A tiny decoder with weights large enough that the tokens depend on everything before them."""
    config = dict(
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_hf({**config, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def answer(turn):
    """Fed tokens that depend on the turn in content, length and finish reason."""
    return [1] * (len(turn.ids) % 4) + [turn.ids[0], 5 if turn.finish_reason == "stop" else 6]


def make_rows(lengths=(1, 2, 17, 30), group=3, limits=(10, 7)):
    """Groups of rows that sample, feed twice and sample."""
    rows = []
    for example, length in enumerate(lengths):
        for generation in range(group):
            keys = [(3, 1, 0, example, generation, turn, 0) for turn in range(2)]
            script = [Sample(limits[0], keys[0]), Feed(answer), Feed([8, 9]), Sample(limits[1], keys[1])]
            rows.append(Row(prompt(length), script, tag=(example, generation)))
    return rows


def texts(finished):
    return [[turn.ids for turn in item.turns] for item in finished]


def sequence(item):
    """All ids of a finished row in order, and (first index, turn) of each turn."""
    ids, spans, turns, fed = list(item.row.prefix), [], iter(item.turns), iter(item.fed)
    for step in item.row.script:
        if isinstance(step, Feed):
            ids += next(fed)
        else:
            turn = next(turns)
            spans.append((len(ids), turn))
            ids += turn.ids
    return ids, spans


def assert_logprobs(model, finished, temperature, atol=1e-4):
    """Every log-prob equals that of a plain causal forward over the row's whole sequence."""
    for item in finished:
        ids, spans = sequence(item)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0].float()
        expected = (logits / temperature).log_softmax(-1)
        for first, turn in spans:
            places = torch.arange(first - 1, first - 1 + len(turn.ids))
            got = torch.tensor(turn.logprobs)
            torch.testing.assert_close(got, expected[places, torch.tensor(turn.ids)], atol=atol, rtol=0)


FAMILIES = {
    "llama": {},
    "sliding": dict(model_type="mistral", sliding_window=6),
    "some layers sliding": dict(
        model_type="qwen3",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "one kv head per query head": dict(num_key_value_heads=6, tie_word_embeddings=False),
}


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_full_forward(family, temperature):
    model = make_model(**FAMILIES[family])
    sampler = Sampler(model, stop_token_ids=STOPS, temperature=temperature, max_rows=7)
    finished = sampler.run(make_rows())
    assert {turn.finish_reason for item in finished for turn in item.turns} == {"stop", "length"}
    assert_logprobs(model, finished, temperature)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [2, 5, 64])
def test_a_stop_that_is_seen_late_changes_no_text(family, steps):
    model = make_model(**FAMILIES[family])
    rows = make_rows(group=6)
    at_once, late = (Sampler(model, stop_token_ids=STOPS, max_rows=7, stop_check_steps=n) for n in (1, steps))
    expected, finished = at_once.run(rows), late.run(rows)
    assert texts(finished) == texts(expected)
    assert [item.fed for item in finished] == [item.fed for item in expected]
    assert_logprobs(model, finished, 1.0)
    assert late.stats["sampled_tokens"] == at_once.stats["sampled_tokens"]
    late.greedy = at_once.greedy = True
    assert texts(late.run(rows)) == texts(at_once.run(rows))


def test_the_caller_works_on_ended_rows_while_the_next_forwards_are_queued(monkeypatch):
    sampler = Sampler(make_model(), stop_token_ids=STOPS, max_rows=4)
    events = []
    for name in ("_decode", "_read"):
        method = getattr(sampler, name)
        monkeypatch.setattr(sampler, name, lambda *args, n=name, m=method: (events.append(n), m(*args))[1])
    rows = make_rows()
    seen = {}

    def finished(index, done):
        assert index not in seen and done.row is rows[index]
        seen[index] = done
        events.append("row")

    results = sampler.run(rows, finished=finished)
    assert [seen[index] for index in range(len(rows))] == results  # each once, and the same objects' content
    order = "".join({"_decode": "d", "_read": "r", "row": "w"}[event] for event in events)
    assert re.fullmatch("(dw*r)+w+", order), order  # after the last read, nothing is left to queue
    assert "dw" in order


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_attention_gives_the_same_texts(family, steps, monkeypatch):
    """With torch's varlen_attn emulated. A call per layer has all fed tokens and new prompts of a forward."""
    calls = plain_varlen.install(monkeypatch)
    model = make_model(**FAMILIES[family])
    rows = make_rows(group=6)
    plain, varlen = (
        Sampler(model, stop_token_ids=STOPS, max_rows=7, stop_check_steps=steps, varlen=on)
        for on in (False, True)
    )
    expected = plain.run(rows)
    assert not calls
    finished = varlen.run(rows)
    assert texts(finished) == texts(expected)
    assert_logprobs(model, finished, 1.0)
    layers = model.config.num_layers
    assert {before for _, (before, _) in calls} == {-1 if w is None else w - 1 for w in model.config.windows}
    assert len(calls) <= layers * varlen.stats["decode_steps"]
    tokens = varlen.stats["fed_tokens"] + varlen.stats["prefill_tokens"]
    assert sum(shape[0] for shape, _ in calls) == layers * tokens  # each once


def test_varlen_attention_of_prompts_without_a_cache(monkeypatch):
    """All prompts have one token, which is each row's first private one: nothing is in the prompts' cache."""
    calls = plain_varlen.install(monkeypatch)
    model = make_model()
    rows = make_rows(lengths=(1,), group=5)
    finished = Sampler(model, stop_token_ids=STOPS, varlen=True).run(rows)
    assert texts(finished) == texts(Sampler(model, stop_token_ids=STOPS).run(rows)) and calls


class Operations(TorchDispatchMode):
    """The names and shapes of all operations, and whether one made the host wait for the device."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal")

    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.append((str(function), shapes))
        if str(function).startswith(self.WAITS):
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


def test_between_two_looks_at_who_has_stopped_nothing_waits_and_no_shape_changes(model):
    """What queueing steps on a GPU, and capturing one in a CUDA graph, needs."""
    sampler = Sampler(model, stop_token_ids=[VOCABULARY], stop_check_steps=8)
    rows = [Row(prompt(9 + i // 4), [Sample(8, key=(i,))]) for i in range(8)]
    sampler.run(rows)  # the caches and buffers are there from then on
    with Operations() as operations:
        sampler.run(rows)
    assert sampler.stats["decode_steps"] == 8
    starts = [i for i, (name, _) in enumerate(operations.seen) if name.startswith("aten.embedding")]
    assert len(starts) == 8 and not operations.waits
    # The first forward takes in the prompts; each later one ends where the next begins.
    steps = [operations.seen[a:b] for a, b in pairwise(starts[1:])]
    assert len(steps) == 6 and all(step == steps[0] for step in steps)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs without CUDA: a recording that is replayed by doing it. Counts recordings and replays."""
    count = Counter()

    def record(work, pool):
        count["recorded"] += 1

        def replay():
            count["replayed"] += 1
            work()

        return replay

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(Sampler, "_recordable", lambda self: self.cuda_graphs)
    return count


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 5])
def test_decode_steps_by_graph_change_no_text(family, steps, varlen, graphs, monkeypatch):
    plain_varlen.install(monkeypatch)
    model = make_model(**FAMILIES[family])
    rows = make_rows(group=6)
    plain, graphed = (
        Sampler(
            model, stop_token_ids=STOPS, max_rows=7, stop_check_steps=steps, cuda_graphs=on, varlen=varlen
        )
        for on in (False, True)
    )
    expected = plain.run(rows)
    assert not graphs
    finished = graphed.run(rows)
    assert texts(finished) == texts(expected)
    assert_logprobs(model, finished, 1.0)
    assert graphed.stats["sampled_tokens"] == plain.stats["sampled_tokens"]
    assert graphed.stats["decode_steps"] == plain.stats["decode_steps"]
    # Few shapes: all is recorded in the first run, most steps are replays, and the next run records nothing.
    assert 0 < graphs["recorded"] < 12 and graphs["replayed"] > graphs["recorded"]
    before = graphs["recorded"]
    assert texts(graphed.run(rows)) == texts(expected) and graphs["recorded"] == before
    graphed.greedy = plain.greedy = True
    assert texts(graphed.run(rows)) == texts(plain.run(rows)) and graphs["recorded"] > before


def test_graphs_and_pinned_memory_are_those_of_the_models_device(graphs, monkeypatch):
    """CUDA takes both from the current device. PyTorch's context that changes it is watched, not entered."""
    model, current, seen = make_model(), [], Counter()

    @contextlib.contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    def watched(module, name):
        function = getattr(module, name)

        def call(*args, **options):
            seen[name, bool(current) and current[-1] is model.output_weight] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in (
        (cuda_graph, "record"),
        (batching, "upload"),
        (engine, "upload"),
        (kv_cache, "upload"),
    ):
        watched(module, name)
    Sampler(model, stop_token_ids=STOPS).run(make_rows())
    assert set(seen) == {("record", True), ("upload", True)} and current == []


def test_graphs_are_forgotten_when_what_they_read_has_moved(graphs):
    model = make_model()
    rows = make_rows()
    sampler = Sampler(model, stop_token_ids=STOPS)
    sampler.run(rows)
    first = graphs["recorded"]
    with torch.no_grad():
        model.output_weight.mul_(1.0)  # in place: the same addresses
    sampler.run(rows)
    assert graphs["recorded"] == first
    model.embed_tokens.weight = torch.nn.Parameter(model.embed_tokens.weight.detach() * 0.99)
    expected = texts(Sampler(model, stop_token_ids=STOPS, cuda_graphs=False).run(rows))
    assert texts(sampler.run(rows)) == expected and graphs["recorded"] > first
    second = graphs["recorded"]
    sampler.run(make_rows(limits=(90, 80)))  # longer caches
    assert graphs["recorded"] > second
    assert texts(sampler.run(rows)) == expected
    third = graphs["recorded"]
    sampler.temperature = 0.7
    expected = texts(Sampler(model, stop_token_ids=STOPS, cuda_graphs=False, temperature=0.7).run(rows))
    assert texts(sampler.run(rows)) == expected and graphs["recorded"] > third


def test_runs_of_other_lengths_record_nothing_new(graphs):
    """From step to step, the longest prompt and what is fed differ by some tokens."""
    model = make_model()
    sampler, plain = (
        Sampler(model, stop_token_ids=STOPS, max_rows=7, stop_check_steps=4, cuda_graphs=on)
        for on in (True, False)
    )
    recorded, memory = [], []
    for step, lengths in enumerate([(1, 2, 17, 30), (29, 5, 3, 31), (33, 9, 1, 12), (30, 40, 2, 8)]):
        rows = make_rows(lengths, limits=(10 + step % 2, 7))
        assert texts(sampler.run(rows)) == texts(plain.run(rows))
        recorded.append(graphs["recorded"])
        memory.append([x.data_ptr() for x in (*sampler._private.layer(0), *sampler._prefixes.layer(1))])
    assert recorded[0] > 0 and recorded[2:] == recorded[1:2] * 2 and memory == memory[:1] * 4


def test_graphs_survive_runs_of_other_kinds(graphs):
    """A validation between two steps has more and shorter prompts, and rows without feeds."""
    model = make_model()
    sampler, plain = (Sampler(model, stop_token_ids=STOPS, cuda_graphs=on) for on in (True, False))
    steps, validation = make_rows(group=6), [Row(prompt(9, i), [Sample(8, (i,))]) for i in range(20)]
    for rows in (validation, steps, validation):  # from now on the memory is large enough for both
        sampler.run(rows)
    before = graphs["recorded"]
    for rows in (steps, validation, steps):
        assert texts(sampler.run(rows)) == texts(plain.run(rows))
    assert graphs["recorded"] == before


def test_recorded_shapes_are_few_and_aligned(graphs):
    """Odd lengths would misalign slices of 16-bit scores."""
    sampler = Sampler(make_model(), stop_token_ids=STOPS, max_rows=48)
    sampler.run(make_rows(lengths=(1, 23, 57, 30, 100, 91), group=8, limits=(60, 40)))
    shapes = [attend_shape for attend_shape, *_ in sampler._graphs._recorded]
    assert len({shape[0] for shape in shapes}) >= 5  # rows
    assert all(length % kv_cache.ALIGNED == 0 for shape in shapes for length in shape[1:5])
    # Whatever the number of rows, little more is read than there is, and never more than the caches hold.
    for rows in (1, 7, 48, 256):
        for capacity in (64, 320, 1280, 4096):
            lengths = [kv_cache.read_length(n, rows, capacity) for n in range(1, capacity + 1)]
            assert all(n <= length <= capacity for n, length in enumerate(lengths, 1))
            assert rows * (lengths[0] - 1) < max(2 * kv_cache.READ_MORE, 2 * rows * kv_cache.ALIGNED)
            assert len(set(lengths)) <= max(1, capacity * kv_cache.power_of_two(rows) // kv_cache.READ_MORE)


def test_rounded_lengths_cost_no_rows(graphs):
    """Where memory is short, capacities have no room to spare."""
    model, rows = make_model(), make_rows(lengths=(1, 2, 17, 30), group=6)
    expected = texts(Sampler(model, stop_token_ids=STOPS, cuda_graphs=False).run(rows))
    private, prompts = 128, 64  # 84 and 29, in multiples of 64
    for fitting in (1, 5, 24):
        tokens = fitting * private + 4 * prompts
        sampler = Sampler(model, stop_token_ids=STOPS, cache_gb=tokens * 256 / 1e9)
        assert texts(sampler.run(rows)) == expected
        assert sampler._private.slots >= fitting
        held = sampler._private.held_tokens + sampler._prefixes.held_tokens
        assert held <= tokens and (sampler._private.capacity, sampler._prefixes.capacity) == (
            private,
            prompts,
        )
    roomy = Sampler(model, stop_token_ids=STOPS)
    roomy.run(rows)
    assert (roomy._private.slots, roomy._private.capacity, roomy._prefixes.capacity) == (24, 256, 256)


def test_the_graphs_used_last_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    model, rows = make_model(), make_rows(group=6)
    sampler = Sampler(model, stop_token_ids=STOPS, max_rows=7)
    expected = texts(Sampler(model, stop_token_ids=STOPS, max_rows=7, cuda_graphs=False).run(rows))
    assert texts(sampler.run(rows)) == expected
    kept = list(sampler._graphs._recorded)
    assert len(kept) == 2
    before = graphs["recorded"]
    one = Row(prompt(30), [Sample(9, (1,))])
    sampler.run([one] * 2)  # two shapes at most: two rows, one row
    assert len(sampler._graphs._recorded) == 2 and before < graphs["recorded"] <= before + 2
    before = graphs["recorded"]
    sampler.run([one] * 2)
    assert graphs["recorded"] == before


@pytest.mark.parametrize("free", [1e9, 9e9])
@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_empties_the_allocators_cache_only_if_it_must(monkeypatch, free, fails):
    calls = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    def work():
        calls.append("work")
        if fails:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: None)
    expected = ["empty"] * (free < cuda_graph.ENOUGH_FREE) + [
        ("begin", "pool", "thread_local"),
        "work",
        "end",
    ]
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        cuda_graph.record(work, "pool")()
        expected.append("replay")
    assert calls == expected


@pytest.mark.parametrize("greedy", [True, False])
def test_texts_do_not_depend_on_the_number_of_rows_at_a_time(model, greedy):
    runs = [
        texts(Sampler(model, stop_token_ids=STOPS, greedy=greedy, max_rows=rows).run(make_rows(group=16)))
        for rows in (1, 7, 64)
    ]
    assert len(runs[0]) == 64
    assert runs[0] == runs[1] == runs[2]


def test_texts_do_not_depend_on_order_and_neighbours(model):
    rows = make_rows()
    sampler = Sampler(model, stop_token_ids=STOPS, max_rows=5)
    expected = {item.row.tag: item.turns for item in sampler.run(rows)}
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    for some in (shuffled, rows[4:5], rows[::5]):
        finished = sampler.run(some)
        assert [item.row for item in finished] == some
        assert texts(finished) == [[turn.ids for turn in expected[row.tag]] for row in some]


def test_members_of_a_group_differ_and_a_rerun_is_equal(model):
    sampler = Sampler(model, stop_token_ids=STOPS)
    first, second = (sampler.run(make_rows(lengths=(17,), group=8)) for _ in range(2))
    assert [item.turns for item in first] == [item.turns for item in second]
    assert len({tuple(item.turns[0].ids) for item in first}) == 8


def test_without_keys_rows_and_turns_differ_and_a_rerun_is_equal(model):
    sampler = Sampler(model, stop_token_ids=[VOCABULARY - 1])
    rows = [Row(prompt(5), [Sample(8), Feed([7]), Sample(8)]) for _ in range(3)]
    first, again = sampler.run(rows), sampler.run(rows)
    turns = [turn.ids for done in first for turn in done.turns]
    assert len({tuple(ids) for ids in turns}) == len(turns)
    assert turns == [turn.ids for done in again for turn in done.turns]


def test_equals_transformers_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = Decoder(ModelConfig.from_hf(config.to_dict()))
    ours.load_state_dict(fused(theirs.state_dict(), config.num_hidden_layers))
    rows = [Row(prompt(length), [Sample(20, ())]) for length in (1, 9, 9, 30)]
    stop = [5, 17, 40]
    finished = Sampler(ours, stop_token_ids=stop, greedy=True).run(rows)
    for item in finished:
        out = theirs.generate(
            torch.tensor([item.row.prefix]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        )
        assert out[0, len(item.row.prefix) :].tolist() == item.turns[0].ids


def fused(weights, layers):
    """Hugging Face names and shapes -> the decoder's."""
    fused = {
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    for layer in range(layers):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        qkv = [weights[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        fused[f"{new}qkv_proj.weight"] = torch.cat(qkv)
        fused[f"{new}o_proj.weight"] = weights[f"{old}self_attn.o_proj.weight"]
        gate_up = [weights[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        fused[f"{new}gate_up_proj.weight"] = torch.cat(gate_up)
        fused[f"{new}down_proj.weight"] = weights[f"{old}mlp.down_proj.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            fused[f"{new}{name}.weight"] = weights[f"{old}{name}.weight"]
    return fused


def test_ends_on_each_stop_token_and_keeps_it(model):
    free = Sampler(model, stop_token_ids=[VOCABULARY], greedy=True).run([Row(prompt(9), [Sample(12, ())])])
    ids = free[0].turns[0].ids
    assert len(ids) == 12 and free[0].turns[0].finish_reason == "length"
    for stop in sorted(set(ids)):
        sampler = Sampler(model, stop_token_ids=[stop, VOCABULARY], greedy=True)
        turn = sampler.run([Row(prompt(9), [Sample(12, ())])])[0].turns[0]
        assert turn.ids == ids[: ids.index(stop) + 1] and turn.finish_reason == "stop"


def test_a_feed_sees_the_turn_before_it_and_what_is_fed_is_recorded(model):
    seen = []

    def feed(turn):
        seen.append(turn)
        return [1, 2, 3]

    script = [
        Feed([4]),
        Sample(3, (0,)),
        Feed(feed),
        Sample(2, (1,)),
        Feed(feed),
        Feed([]),
        Sample(1, (2,)),
        Feed([7]),
    ]
    item = Sampler(model, stop_token_ids=[VOCABULARY]).run([Row(prompt(5), script)])[0]
    assert [len(turn.ids) for turn in item.turns] == [3, 2, 1] and seen == item.turns[:2]
    assert item.fed == [[4], [1, 2, 3], [1, 2, 3], [], [7]]
    assert {turn.finish_reason for turn in item.turns} == {"length"}
    assert_logprobs(model, [item], 1.0)


def test_a_prompt_is_run_once_while_its_rows_follow_each_other(model):
    rows = make_rows(lengths=(17, 30), group=9)
    sampler = Sampler(model, stop_token_ids=STOPS, max_rows=4)
    finished = sampler.run(rows)
    assert sampler.stats["prefill_tokens"] == 16 + 29
    assert sampler.stats["sampled_tokens"] == sum(len(turn.ids) for item in finished for turn in item.turns)
    assert sampler.stats["fed_tokens"] == sum(len(ids) for item in finished for ids in item.fed)
    # Continuous: far fewer steps than if each batch of four waited for its slowest row.
    assert sampler.stats["decode_steps"] < sampler.stats["sampled_tokens"] / 4 + 17


@pytest.mark.parametrize("new_tokens", [1, 40, 4096])
def test_many_rows_through_few_slots(model, monkeypatch, new_tokens):
    """Groups come in any order and come back later; rows wait for room for their prompt or in the forward."""
    monkeypatch.setattr("grpo.sampler.batching.NEW_TOKENS", new_tokens)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i, example in enumerate(torch.randint(9, (45,), generator=generator).tolist()):
        limits = torch.randint(1, 12, (2,), generator=generator).tolist()
        script = [Sample(limits[0], (i, 0)), Feed(answer), Sample(limits[1], (i, 1))]
        rows.append(Row(prompt(1 + 4 * example), script, i))
    alone = Sampler(model, stop_token_ids=STOPS, max_rows=1).run(rows)
    for max_rows, cache_gb in ((6, 2.0), (20, 1e-4)):
        sampler = Sampler(model, stop_token_ids=STOPS, max_rows=max_rows, cache_gb=cache_gb)
        finished = sampler.run(rows)
        assert [item.row.tag for item in finished] == list(range(45)) and texts(finished) == texts(alone)
        assert_logprobs(model, finished, 1.0)


def test_progress_counts_to_the_end(model):
    calls = []
    Sampler(model, stop_token_ids=STOPS, max_rows=3).run(
        make_rows(), progress=lambda *call: calls.append(call)
    )
    assert calls == sorted(set(calls)) and calls[-1] == (12, 12)


def test_cache_gb_bounds_the_caches_and_changes_no_text(model):
    expected = texts(Sampler(model, stop_token_ids=STOPS).run(make_rows()))
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head size, float32
    one_row = (
        1 + 10 + 64 + 2 + 7 + 29
    )  # the prompt's last token, script with 64 for the unknown feed, longest prompt
    for rows in (1, 2, 3):
        sampler = Sampler(model, stop_token_ids=STOPS, cache_gb=rows * one_row * token_bytes / 1e9)
        assert texts(sampler.run(make_rows())) == expected
        held = sampler._private.held_tokens + sampler._prefixes.held_tokens
        assert sampler._private.slots >= rows and held <= rows * one_row
    with pytest.raises(
        ValueError, match=r"cache_gb must be at least 2.89e-05 for one row of 113 tokens, got 2.87e-05"
    ):
        Sampler(model, stop_token_ids=STOPS, cache_gb=(one_row - 1) * token_bytes / 1e9).run(make_rows())


@pytest.mark.parametrize("by_graph", [False, True])
@pytest.mark.parametrize("cache_gb", [2.0, 6e-5])
def test_feeds_longer_than_foreseen(model, cache_gb, by_graph, graphs):
    """The caches grow; where memory is short, rows lose their slot and run again later: same texts."""

    def rows():
        feed = Feed(lambda turn: [turn.ids[0]] * (90 + 3 * len(turn.ids)))
        return [
            Row(row.prefix, [row.script[0], feed, row.script[3]], row.tag)
            for row in make_rows(lengths=(1, 2, 17))
        ]

    alone = Sampler(model, stop_token_ids=STOPS, max_rows=1, cuda_graphs=False).run(rows())
    sampler = Sampler(model, stop_token_ids=STOPS, cache_gb=cache_gb, cuda_graphs=by_graph)
    for _ in range(2):  # the second run finds the grown caches
        finished = sampler.run(rows())
        assert texts(finished) == texts(alone)
        assert_logprobs(model, finished, 1.0)
        held = sampler._private.held_tokens + sampler._prefixes.held_tokens
        assert held * sampler._private.token_bytes <= cache_gb * 1e9


def test_a_feed_too_long_for_the_cache_names_cache_gb(model):
    rows = [Row(prompt(5), [Sample(3, (0,)), Feed(lambda turn: [1] * 200), Sample(3, (1,))])]
    sampler = Sampler(model, stop_token_ids=STOPS, cache_gb=100 * 256 / 1e9)
    with pytest.raises(ValueError, match="cache_gb must be at least"):
        sampler.run(rows)


def test_rows_longer_than_the_models_positions(model):
    Sampler(model, stop_token_ids=STOPS).run([Row(prompt(200), [Sample(56, (0,))])])
    with pytest.raises(ValueError, match=r"rows\[1\]: a prompt of 200 tokens and up to 57 .* 256"):
        rows = [Row(prompt(1), [Sample(5, (0,))]), Row(prompt(200), [Feed([1]), Sample(56, (0,))])]
        Sampler(model, stop_token_ids=STOPS).run(rows)
    late = [Row(prompt(200), [Sample(9, (0,)), Feed(lambda turn: [1] * 50), Sample(9, (1,))])]
    with pytest.raises(ValueError, match="a prompt of 200 tokens"):
        Sampler(model, stop_token_ids=STOPS).run(late)


def test_new_weights_show_in_the_next_run(model):
    sampler = Sampler(make_model(), stop_token_ids=STOPS, temperature=0.9)
    before = sampler.run(make_rows())
    learner = make_model()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sampler.load_weights(learner.state_dict())
    after = sampler.run(make_rows())
    assert texts(before) != texts(after)
    assert_logprobs(learner, after, 0.9)
    # Shared storage needs no copy: stepping the learner's weights is enough.
    shared = Sampler(learner, stop_token_ids=STOPS, temperature=0.9)
    shared.load_weights(learner.state_dict())
    assert texts(shared.run(make_rows())) == texts(after)


def test_weights_that_do_not_fit_are_refused(model):
    sampler = Sampler(model, stop_token_ids=STOPS)
    weights = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"missing: \['norm.weight'\], unknown: \['other'\]"):
        sampler.load_weights(
            {**{k: v for k, v in weights.items() if k != "norm.weight"}, "other": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match=r"norm.weight'\] must have shape \(32,\), got \(31,\)"):
        sampler.load_weights({**weights, "norm.weight": torch.zeros(31)})


def test_bfloat16(model):
    half = make_model().to(torch.bfloat16)
    finished = Sampler(half, stop_token_ids=STOPS, max_rows=5).run(make_rows())
    assert all(len(item.turns) == 2 for item in finished)
    assert_logprobs(
        half, finished, 1.0, atol=1.0
    )  # logits of some 10 nats at 8 bits; weights of one layer's scale
    differences = []
    for item in finished:
        ids, spans = sequence(item)
        with torch.no_grad():
            expected = half.logits(half(torch.tensor([ids])))[0].float().log_softmax(-1)
        differences += [
            abs(expected[first - 1 + i, turn.ids[i]].item() - turn.logprobs[i])
            for first, turn in spans
            for i in range(len(turn.ids))
        ]
    assert sum(differences) / len(differences) < 0.1


def test_diverged_weights_raise_and_leave_no_trace():
    model = make_model()
    sampler = Sampler(model, stop_token_ids=STOPS)
    expected = texts(sampler.run(make_rows()))
    good = model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        sampler.run(make_rows())
    with torch.no_grad():
        model.embed_tokens.weight.copy_(good)
    assert texts(sampler.run(make_rows())) == expected


def test_an_interrupted_run_leaves_the_sampler_usable(model):
    sampler = Sampler(model, stop_token_ids=STOPS, max_rows=5)
    expected = texts(sampler.run(make_rows()))

    def interrupt(turn):
        raise KeyboardInterrupt

    rows = make_rows()
    rows[4] = dataclasses.replace(rows[4], script=[Sample(3, (1,)), Feed(interrupt), Sample(3, (2,))])
    with pytest.raises(KeyboardInterrupt):
        sampler.run(rows)
    assert texts(sampler.run(make_rows())) == expected


def test_settings_may_change_between_runs(model):
    sampler = Sampler(model, stop_token_ids=STOPS)
    first = texts(sampler.run(make_rows()))
    sampler.temperature, sampler.top_k = 0.3, 2
    cool = sampler.run(make_rows())
    assert_logprobs(model, cool, 0.3)
    sampler.temperature, sampler.top_k, sampler.max_rows = 1.0, 0, 2
    assert texts(sampler.run(make_rows())) == first
    sampler.greedy = True
    greedy = sampler.run(make_rows(lengths=(17,)))
    assert texts(greedy)[0] == texts(greedy)[1]
    assert_logprobs(model, greedy, 1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(top_k=-1), "top_k must be at least 0, got -1"),
        (dict(max_rows=0), "max_rows must be at least 1, got 0"),
        (dict(stop_check_steps=0), "stop_check_steps must be at least 1, got 0"),
        (dict(stop_token_ids=[]), "stop_token_ids must hold at least one token"),
    ],
)
def test_settings_that_make_no_sense(model, changes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, **{"stop_token_ids": STOPS, **changes})


@pytest.mark.parametrize(
    "row, message",
    [
        (Row((), [Sample(1, ())]), "prefix must hold at least one token"),
        (Row((1,), [Feed([2])]), "script must hold a Sample"),
        (Row((1,), [Sample(0, ())]), "limit must be at least 1, got 0"),
        (Row((1,), [Feed(answer), Sample(1, ())]), "before its first Sample"),
    ],
)
def test_scripts_that_make_no_sense(model, row, message):
    with pytest.raises(ValueError, match=rf"rows\[0\]: .*{message}"):
        Sampler(model, stop_token_ids=STOPS).run([row])


def test_no_rows(model):
    assert Sampler(model, stop_token_ids=STOPS).run([]) == []


def test_plan_counts_prompts_side_by_side():
    prefixes = [(i // 4,) * 11 for i in range(40)]  # ten groups of four, ten cached tokens each
    # Eight rows touch three groups at most (unaligned); twice that for stragglers.
    assert plan(prefixes, 20, 10, 8, 10**6) == (8, 6)
    # 100 tokens: three rows of 20 and the four slots that two neighbouring prompts get, at most one per row.
    assert plan(prefixes, 20, 10, 8, 100) == (3, 3)
    assert plan(prefixes[:4], 20, 10, 8, 100) == (4, 1)
