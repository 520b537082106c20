"""Tree packing: row contents, exact attention, gradients equal to one row per sequence, isolated branches."""

import plain_varlen
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax, scaled_dot_product_attention

from grpo.episode import Episode
from grpo.learner.packing import pack_episodes, pack_sequences
from grpo.learner.tree_attention import Tree, dense_mask, runs, tree_attend


def episode(prompt, completion, roles="r", group=0):
    """roles: one letter per token (r reflection, c context, y retry), the last one repeated."""
    names = {"r": "reflection", "c": "context", "y": "retry"}
    letters = (roles + roles[-1] * len(completion))[: len(completion)]
    return Episode(
        example_id=f"example-{group}",
        group_id=group,
        generation=0,
        prompt_ids=list(prompt),
        completion_ids=list(completion),
        roles=[names[letter] for letter in letters],
        logprobs=[-0.5 - 0.01 * token for token in completion],
        finish_reason="stop",
        reward=0.0,
    )


def trained_ids(batch):
    return batch.ids[batch.pairs].tolist()


def test_one_tree_spelled_out():
    group = [episode([1, 2, 3], ids) for ids in ([10, 11, 12], [20], [10, 31, 12], [10, 11])]
    (batch,) = pack_episodes(group, train_on="reflection", max_tokens=100)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 31]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4]]
    assert batch.trees == [Tree((0, 1, 2), ((3, 4), (3, 5)))]
    pairs = list(zip(batch.select.tolist(), batch.ids.tolist(), strict=True))
    assert pairs == [(2, 10), (3, 11), (4, 12), (3, 31), (5, 12), (2, 20)]
    assert batch.pairs.tolist() == [0, 1, 2, 0, 3, 4, 0, 1, 5]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 1]
    torch.testing.assert_close(batch.sampler_logprobs, -0.5 - 0.01 * batch.ids[batch.pairs])


def test_what_prompts_begin_with_in_common_stands_once():
    (batch,) = pack_episodes(
        [episode([1, 2, 3], [10, 11]), episode([1, 2, 4], [12], group=1)], train_on="all", max_tokens=9
    )
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.trees == [Tree((0, 1, 2), ((3,),)), Tree((0, 1, 4), ())]
    assert batch.select.tolist() == [2, 3, 4]


def test_values_of_pairs_reach_all_their_tokens_and_gradients_add_up():
    group = [episode([1], [10, 11]), episode([1], [10, 12]), episode([1], [10, 11])]
    (batch,) = pack_episodes(group, train_on="reflection", max_tokens=100)
    values = torch.arange(3.0, requires_grad=True)  # of the pairs (1, 10), (10, 11), (10, 12)
    spread = batch.per_token(values)
    assert trained_ids(batch) == [10, 11, 10, 12, 10, 11]
    assert spread.tolist() == [0.0, 1.0, 0.0, 2.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(spread, values, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert gradient.tolist() == [21.0, 34.0, 8.0]


def test_what_follows_the_last_trained_token_is_left_out():
    group = [episode([1, 2], [10, 11, 12, 13, 14], "rrccy")]
    (batch,) = pack_episodes(group, train_on="reflection", max_tokens=100)
    assert batch.input_ids.tolist() == [[1, 2, 10]] and trained_ids(batch) == [10, 11]
    (batch,) = pack_episodes(group, train_on="all", max_tokens=100)
    assert batch.input_ids.tolist() == [[1, 2, 10, 11, 12, 13]]
    assert trained_ids(batch) == [10, 11, 14] and batch.select.tolist() == [1, 2, 5]


def test_nothing_to_train_still_makes_a_batch():
    group = [episode([1, 2], [10, 11]), episode([7], []), episode([7], [9], "c")]
    (batch,) = pack_episodes(group, train_on="retry", max_tokens=100)
    assert batch.trees == [Tree((0,), ())] and batch.input_ids.tolist() == [[7]]
    for tensor in (batch.select, batch.ids, batch.pairs, batch.sampler_logprobs, batch.sequence_ids):
        assert tensor.shape == (0,)
    q = torch.randn(1, 2, 1, 4)
    torch.testing.assert_close(tree_attend(batch.trees, [None])(0, q, q, q), q)
    assert pack_episodes([], train_on="retry", max_tokens=100) == []


# Prompts from 1 token, completions from 0 tokens, limits below a single sequence and above everything.
groups_of_sequences = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 7), max_size=5)), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    groups_of_sequences,
    st.integers(1, 40),
    st.sampled_from([2, 50]),  # a small vocabulary: shared prefixes, equal prompts and completions
    st.randoms(use_true_random=False),
)
def test_every_trained_token_is_packed_once_with_its_context(shapes, max_tokens, vocabulary, rng):
    def token():
        return rng.randrange(vocabulary)

    groups = []
    for prompt_length, lengths in shapes:
        prompt = [token() for _ in range(prompt_length)]
        completions = [([token() for _ in range(n)], [rng.random() < 0.7 for _ in range(n)]) for n in lengths]
        groups.append((prompt, completions))
    sequences = [(prompt, *completion) for prompt, completions in groups for completion in completions]
    expected = {
        (index, i): (ids[i], prompt + ids[:i])
        for index, (prompt, ids, loss_mask) in enumerate(sequences)
        for i, trained in enumerate(loss_mask)
        if trained
    }
    found = {}
    for batch in pack_sequences(groups, max_tokens=max_tokens):
        assert batch.num_tokens <= max_tokens or sum(len(tree.branches) for tree in batch.trees) <= 1
        visible, positions = dense_mask(batch.trees), batch.position_ids[0]
        assert visible.shape == (batch.num_tokens,) * 2
        contexts = [tuple(batch.input_ids[0][row].tolist()) for row in visible]
        assert len(set(contexts)) == len(contexts)  # no prefix stands twice
        for pair, index in zip(batch.pairs, batch.sequence_ids, strict=True):
            where = batch.select[pair]
            assert sorted(positions[visible[where]].tolist()) == list(range(positions[where] + 1))
            key = (index.item(), positions[where].item() + 1 - len(sequences[index][0]))
            assert key not in found
            found[key] = (batch.ids[pair].item(), list(contexts[where]))
    assert found == expected


def test_a_group_too_long_is_split_and_its_prompt_repeated():
    group = [episode([1, 2, 3], [10 + i] * 5) for i in range(5)]
    batches = pack_episodes(group, train_on="reflection", max_tokens=11)
    two, one = Tree((0, 1, 2), ((3, 4, 5, 6), (7, 8, 9, 10))), Tree((0, 1, 2), ((3, 4, 5, 6),))
    assert [batch.trees for batch in batches] == [[two], [two], [one]]
    assert [batch.sequence_ids.unique().tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_a_group_fits_by_what_it_adds():
    """Five completions of 6 tokens would take 33; sharing 4 of them they take 12."""
    group = [episode([1, 2, 3], [10, 11, 12, 13, 20 + i, 30]) for i in range(5)]
    assert [batch.num_tokens for batch in pack_episodes(group, train_on="reflection", max_tokens=12)] == [12]
    assert [batch.num_tokens for batch in pack_episodes(group, train_on="reflection", max_tokens=11)] == [
        11,
        8,
    ]


FORESTS = [
    [Tree((0, 1, 2, 3, 4), ((5, 6, 7, 8), (9, 10, 11), (12,)))],
    [
        Tree((0,), ((1, 2), (3, 4))),
        Tree((5, 6, 7, 8), ()),
        Tree((5, 6, 9, 10, 11, 12), ((13, 14, 15),)),  # its prompt begins like the one before
        Tree((16, 17), ((18, 19, 20, 21, 22), (18, 23))),
    ],
    [Tree((2, 1, 0), ((3, 4, 5, 6), (3, 4, 7, 8), (9, 10, 11, 12)))],
]


IMPLEMENTATIONS = pytest.mark.parametrize("varlen", [False, True], ids=["sdpa", "varlen"])


def assert_tree_attention_equals_the_dense_mask(trees, window, kv_heads, varlen):
    """Result and gradients, in float64."""
    torch.manual_seed(0)
    mask = dense_mask(trees, window=window)
    q, k, v, upstream = (
        torch.randn(1, heads, len(mask), 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    ours = tree_attend(trees, [None, window], varlen=varlen)(1, q, k, v)
    right = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(right, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Full, narrower than the prompt, narrower than a branch, self only; 4 query heads on 4, 2 and 1 key heads.
@IMPLEMENTATIONS
@pytest.mark.parametrize("trees", FORESTS, ids=["ragged", "forest", "shared"])
@pytest.mark.parametrize("window", [None, 4, 2, 1])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_tree_attention_equals_the_dense_mask(trees, window, kv_heads, varlen, monkeypatch):
    plain_varlen.install(monkeypatch)
    assert_tree_attention_equals_the_dense_mask(trees, window, kv_heads, varlen)


@IMPLEMENTATIONS
@settings(max_examples=60, deadline=None)
@given(
    groups_of_sequences,
    st.sampled_from([2, 50]),
    st.sampled_from([None, 3, 1]),
    st.randoms(use_true_random=False),
)
def test_tree_attention_of_packed_rows_equals_the_dense_mask(varlen, shapes, vocabulary, window, rng):
    """Groups that share beginnings of prompts and of completions, in all ways that packing makes."""
    groups = []
    for prompt_length, lengths in shapes:
        prompt, *completions = (
            [rng.randrange(vocabulary) for _ in range(n)] for n in (prompt_length, *lengths)
        )
        groups.append((prompt, [(ids, [True] * len(ids)) for ids in completions]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = plain_varlen.install(monkeypatch)
        for batch in pack_sequences(groups, max_tokens=1000):
            assert_tree_attention_equals_the_dense_mask(batch.trees, window, 2, varlen)
            lengths, _ = runs(batch.trees)
            assert sum(lengths) == batch.num_tokens  # every token is a query once
            assert len(lengths) <= sum(max(1, len(tree.branches)) for tree in batch.trees)
        assert all(shape[0] == batch.num_tokens for shape, _ in calls) and (len(calls) == 1) == varlen


def test_the_runs_of_a_row():
    tree = Tree((0, 1), ((2, 3, 4), (2, 5), (6,)))
    assert runs([tree]) == ([5, 1, 1], [(0, 1, 2, 3, 4), (0, 1, 2, 5), (0, 1, 6)])
    assert runs([Tree((0,), ())]) == ([1], [(0,)])
    # A second prompt that begins like the first, and one that is the beginning of another branch.
    assert runs([tree, Tree((0, 7, 8), ((9,),)), Tree((0, 1, 6), ())]) == (
        [5, 1, 1, 3],
        [(0, 1, 2, 3, 4), (0, 1, 2, 5), (0, 1, 6), (0, 7, 8, 9)],
    )


@IMPLEMENTATIONS
def test_tree_attention_in_bfloat16(varlen, monkeypatch):
    plain_varlen.install(monkeypatch)
    q, k, v = (torch.randn(1, heads, 13, 8).bfloat16() for heads in (4, 2, 2))
    ours = tree_attend(FORESTS[0], [None], varlen=varlen)(0, q, k, v)
    assert ours.dtype == torch.bfloat16
    mask = dense_mask(FORESTS[0])
    right = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours.float(), right, rtol=0.02, atol=0.02)


class TinyDecoder(torch.nn.Module):
    """Two attention layers with learnt positions: enough for a wrong mask or position to show."""

    def __init__(self, vocab=50, size=8, heads=2):
        super().__init__()
        self.embed, self.place = torch.nn.Embedding(vocab, size), torch.nn.Embedding(20, size)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(size, 3 * size) for _ in range(2))
        self.heads = heads

    def forward(self, input_ids, position_ids, attend):
        x = self.embed(input_ids) + self.place(position_ids)
        for layer, project in enumerate(self.qkv):
            heads = project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + attend(layer, *heads).transpose(1, 2).flatten(2).tanh()
        return log_softmax(x @ self.embed.weight.T, -1)


def causal(layer, q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("max_tokens", [1000, 20, 1])
def test_gradients_equal_those_of_one_row_per_sequence(max_tokens):
    torch.manual_seed(0)
    model = TinyDecoder().double()
    groups = [
        ([3, 1, 4, 1], [([5, 9, 2], [True] * 3), ([6], [True]), ([5, 9, 5, 8], [False, True, False, True])]),
        ([2], [([7, 1], [True, True]), ([8, 2, 8], [True, False, False])]),
        ([1, 4, 1, 4, 2], [([13, 5], [False, False]), ([6, 2, 3], [True, True, True])]),
    ]  # fmt: skip
    weights = torch.randn(8, 6, dtype=torch.float64)  # of each sequence's tokens, so that mix-ups show

    loss, index = 0, 0
    for prompt, completions in groups:
        for ids, loss_mask in completions:
            row = torch.tensor([prompt + ids])
            logprobs = model(row, torch.arange(row.shape[1])[None], causal)[0, :-1]
            logprobs = logprobs.gather(1, row[0, 1:, None])[len(prompt) - 1 :, 0]
            loss = loss + (logprobs * weights[index, : len(ids)] * torch.tensor(loss_mask)).sum()
            index += 1
    expected = torch.autograd.grad(loss, list(model.parameters()))

    packed_loss = 0
    for batch in pack_sequences(groups, max_tokens=max_tokens):
        logprobs = model(batch.input_ids, batch.position_ids, tree_attend(batch.trees, [None, None]))[0]
        logprobs = batch.per_token(logprobs[batch.select].gather(1, batch.ids[:, None])[:, 0])
        prompt_lengths = torch.tensor([len(p) for p, completions in groups for _ in completions])
        step = batch.position_ids[0, batch.select][batch.pairs] - prompt_lengths[batch.sequence_ids] + 1
        packed_loss = packed_loss + (logprobs * weights[batch.sequence_ids, step]).sum()
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-10)
    for ours, right in zip(torch.autograd.grad(packed_loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-9)


def test_a_completion_does_not_move_the_others():
    torch.manual_seed(0)
    model = TinyDecoder()

    def logprobs(first):
        (batch,) = pack_sequences(
            [([1, 2, 3], [(first, [True] * 3), ([20, 21], [True, True])]), ([4], [([5], [True])])],
            max_tokens=99,
        )
        out = model(batch.input_ids, batch.position_ids, tree_attend(batch.trees, [None, 2]))[0]
        out = batch.per_token(out[batch.select].gather(1, batch.ids[:, None])[:, 0])
        return out[batch.sequence_ids == 0], out[batch.sequence_ids != 0]

    one, others = logprobs([10, 11, 12])
    changed, unmoved = logprobs([40, 41, 42])
    assert torch.equal(others, unmoved) and not torch.equal(one, changed)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        pack_episodes([], train_on="reflection", max_tokens=0)
    with pytest.raises(ValueError, match="train_on must be one of .*, got 'answer'"):
        pack_episodes([episode([1], [2])], train_on="answer", max_tokens=9)
    with pytest.raises(ValueError, match="prompt_ids must hold at least one token"):
        pack_sequences([([], [([1], [True])])], max_tokens=9)
    with pytest.raises(ValueError, match="loss_mask must have one entry per token, got 2 for the 1 tokens"):
        pack_sequences([([1], [([1], [True, False])])], max_tokens=9)
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match=r"one packed row of 13 tokens, got shape \(1, 1, 4, 2\)"):
        tree_attend(FORESTS[0], [None])(0, q, q, q)
    with pytest.raises(ValueError, match=r"must be equally long, got \(2, 2, 1\)"):
        Episode("a", 0, 0, [1], [1, 2], ["retry"] * 2, [0.0], "stop", 0.0)
