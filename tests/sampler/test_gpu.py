"""The trainer on a GPU, against itself on the CPU. Skipped without one; kernels: test_kernels.py."""

import copy

import grpo_kernels
import pytest
import tiny
import tiny_run
import torch
from test_engine import FAMILIES, STOPS, VOCABULARY, make_model, make_rows, prompt, sequence, texts
from torch.nn.functional import scaled_dot_product_attention

from grpo.learner.packing import pack_sequences
from grpo.learner.tree_attention import dense_mask, tree_attend
from grpo.run.checkpoint import Saver
from grpo.sampler import engine as sampler_module
from grpo.sampler.engine import Row, Sample, Sampler
from grpo.sampler.kv_cache import CachedAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_writes_what_it_writes_on_a_cpu(family, steps, graphs):
    model = make_model(**FAMILIES[family])
    rows = make_rows(group=6)
    expected = Sampler(model, stop_token_ids=STOPS, max_rows=7).run(rows)
    there = copy.deepcopy(model).to("cuda")
    sampler = Sampler(there, stop_token_ids=STOPS, max_rows=7, stop_check_steps=steps, cuda_graphs=graphs)
    for _ in range(2):  # recording, and replaying only
        finished = sampler.run(rows)
        assert texts(finished) == texts(expected)
        for ours, right in zip(finished, expected, strict=True):
            for turn, other in zip(ours.turns, right.turns, strict=True):
                torch.testing.assert_close(
                    torch.tensor(turn.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0
                )


def test_graphs_follow_the_weights_and_the_settings():
    model, rows = make_model().to("cuda"), make_rows(group=6)
    graphed, plain = (Sampler(model, stop_token_ids=STOPS, cuda_graphs=on) for on in (True, False))
    before = texts(graphed.run(rows))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # an optimiser's step: in place
    assert texts(graphed.run(rows)) == texts(plain.run(rows)) != before
    for setting in ({"temperature": 0.7}, {"greedy": True}, {"top_p": 0.5, "greedy": False}, {"top_k": 3}):
        for sampler in (graphed, plain):
            for name, value in setting.items():
                setattr(sampler, name, value)
        assert texts(graphed.run(rows)) == texts(plain.run(rows)), setting
    model.embed_tokens.weight = torch.nn.Parameter(model.embed_tokens.weight.detach() * 0.9)
    assert texts(graphed.run(rows)) == texts(plain.run(rows))


def test_between_two_looks_at_who_has_stopped_nothing_waits(monkeypatch):
    """CUDA's own watch, over what tests/sampler/test_engine.py counts by operation."""
    model = make_model().to("cuda")
    sampler = Sampler(model, stop_token_ids=[VOCABULARY], stop_check_steps=8, cuda_graphs=False)
    rows = [Row(prompt(9 + i // 4), [Sample(8, key=(i,))]) for i in range(8)]
    expected = texts(sampler.run(rows))
    advance, choose, calls = CachedAttention.advance, sampler_module.choose, []

    def watched_advance(self):
        torch.cuda.set_sync_debug_mode("error")
        advance(self)

    def watched_choose(*args, **options):
        found = choose(*args, **options)
        calls.append(1)
        torch.cuda.set_sync_debug_mode("default")
        return found

    monkeypatch.setattr(CachedAttention, "advance", watched_advance)
    monkeypatch.setattr(sampler_module, "choose", watched_choose)
    try:
        assert texts(sampler.run(rows)) == expected and len(calls) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("train_on", ["reflection", "attempt"])
def test_an_update_has_the_gradients_of_a_cpu(train_on):
    """In float32, with the Triton kernels on one side and the PyTorch references on the other."""
    parts = tiny.build(train_on=train_on)
    episodes = tiny.episodes(parts)
    expected, right, _ = tiny.update(parts, episodes, beta=0.0)
    there = copy.copy(parts)
    there.model = copy.deepcopy(parts.model).to("cuda")
    kernels = grpo_kernels.backend("cuda", "triton")
    names = ("linear_logprob", "grpo_loss", "group_advantage")
    functions = {name: getattr(kernels, name) for name in names}
    metrics, gradients, _ = tiny.update(there, episodes, beta=0.0, functions=functions)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-5
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), right[name], rtol=1e-3, atol=1e-5)


def test_products_of_16_bit_numbers_are_returned_in_float32():
    a, b = (torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    for multiply, x, y in ((torch.bmm, a, b), (torch.mm, a[0], b[0])):
        there = multiply(x.to("cuda"), y.to("cuda"), out_dtype=torch.float32)
        assert there.dtype == torch.float32
        torch.testing.assert_close(there.cpu(), x.float() @ y.float(), rtol=1e-5, atol=1e-4)


@pytest.fixture
def process():
    """Takes back what `deterministic` sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, deterministic", [("bfloat16", False), ("bfloat16", True), ("float32", True)])
def test_two_runs_of_train_py_are_equal(process, tmp_path, dtype, deterministic):
    """In float32 they were not on an H100, without `deterministic` (docs/performance.md)."""
    model = tiny_run.save_model(tmp_path / "model")
    settings = {"device": "cuda", "dtype": dtype, "deterministic": deterministic, "stop_check_steps": 4}
    found = []
    for name in ("first", "second"):
        done = tiny_run.run(tiny_run.arguments(model, tmp_path / name, **settings))
        assert done.status == 0, done.err
        found.append(tiny_run.contents(done.folder))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_a_checkpoint_written_during_a_rollout_is_that_of_its_step(tmp_path, monkeypatch):
    """While CUDA graphs are recorded and replayed; the other run samples nothing meanwhile."""
    model = tiny_run.save_model(tmp_path / "model")
    settings = {"device": "cuda", "dtype": "bfloat16", "eval_steps": 0, "save_total_limit": 4}
    during = tiny_run.run(tiny_run.arguments(model, tmp_path / "during", **settings))
    save = Saver.save

    def save_at_rest(saver, *args, **options):
        save(saver, *args, **options)
        saver.wait()

    monkeypatch.setattr(Saver, "save", save_at_rest)
    at_rest = tiny_run.run(tiny_run.arguments(model, tmp_path / "at rest", **settings))
    assert (during.status, at_rest.status) == (0, 0), during.err + at_rest.err
    found = [
        [path.read_bytes() for path in sorted((done.folder / "checkpoints").rglob("*.safetensors"))]
        for done in (during, at_rest)
    ]
    assert found[0] == found[1] and len(found[0]) == 5  # four models, the last one with its optimiser


# --- attn_implementation: varlen ----------------------------------------------------------------------------
#
# `auto` stays sdpa until these have passed on a GPU. An error is the distance from the result in float64 or
# float32, relative to its norm; varlen may be at most twice as wrong as sdpa.


def row(groups=3, prompt_length=37, lengths=(70, 65, 41, 33, 12, 1)):
    """A packed row of groups that begin alike."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    system, packed = ids(11), []
    for _ in range(groups):
        start = ids(5)
        completions = [(start + ids(length), [True] * (5 + length)) for length in lengths]
        packed.append((system + ids(prompt_length), completions))
    (batch,) = pack_sequences(packed, max_tokens=10**4)
    return batch


def attention_and_gradients(attend, tensors, dtype):
    q, k, v, upstream = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(0, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def errors(results, truth):
    return [((x.double() - t).norm() / t.norm()).item() for x, t in zip(results, truth, strict=True)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads, kv_heads, size", [(12, 2, 128), (9, 3, 64), (4, 4, 96)])
def test_varlen_tree_attention_is_as_near_to_float64_as_sdpa(heads, kv_heads, size, window):
    torch.manual_seed(0)
    batch = row()
    tensors = [
        torch.randn(1, n, batch.num_tokens, size, device="cuda").bfloat16()
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    mask = dense_mask(batch.trees, window=window).to("cuda")

    def exact(layer, q, k, v):
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    truth = attention_and_gradients(exact, tensors, torch.float64)
    sdpa, varlen = (
        attention_and_gradients(tree_attend(batch.trees, [window], varlen=on), tensors, torch.bfloat16)
        for on in (False, True)
    )
    for error, other in zip(errors(varlen, truth), errors(sdpa, truth), strict=True):
        assert error < 2 * other + 1e-4 and error < 0.02, (error, other)


def test_varlen_tree_attention_repeats_under_deterministic_algorithms():
    batch = row()
    tensors = [torch.randn(1, n, batch.num_tokens, 64, device="cuda").bfloat16() for n in (8, 2, 2, 8)]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            attention_and_gradients(tree_attend(batch.trees, [None], varlen=True), tensors, torch.bfloat16)
            for _ in range(4)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_a_varlen_update_in_bfloat16():
    parts = tiny.build()
    episodes = tiny.episodes(parts)
    _, right, _ = tiny.update(parts, episodes, dtype=torch.float64, beta=0.0)
    there = copy.copy(parts)
    there.model = copy.deepcopy(parts.model).to("cuda")
    truth = [gradient.double() for gradient in right.values()]
    found = {}
    for name in ("sdpa", "varlen"):
        _, gradients, _ = tiny.update(
            there, episodes, dtype=torch.bfloat16, beta=0.0, attn_implementation=name
        )
        found[name] = sum(errors([gradients[key].cpu() for key in right], truth))
    assert found["varlen"] < 2 * found["sdpa"], found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphs", [False, True])
def test_varlen_sampling_in_bfloat16(family, graphs):
    """Its log-probs are as near to a full forward pass in float32 as with sdpa."""
    model = make_model(**FAMILIES[family]).to("cuda").bfloat16()
    exact = copy.deepcopy(model).float()
    differences = {}
    for varlen in (False, True):
        sampler = Sampler(
            model, stop_token_ids=STOPS, max_rows=7, stop_check_steps=4, cuda_graphs=graphs, varlen=varlen
        )
        found = []
        for item in sampler.run(make_rows(group=6)):
            ids, spans = sequence(item)
            with torch.no_grad():
                logits = exact.logits(exact(torch.tensor([ids], device="cuda")))[0]
            logprobs = logits.log_softmax(-1).cpu()
            found += [
                abs(logprobs[first - 1 + i, turn.ids[i]].item() - turn.logprobs[i])
                for first, turn in spans
                for i in range(len(turn.ids))
            ]
        differences[varlen] = sum(found) / len(found)
    assert differences[True] < 2 * differences[False], differences
