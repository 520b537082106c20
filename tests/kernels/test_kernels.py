"""The Triton kernels against float64 and the PyTorch references, and one test for each bug that users of
other kernels reported (lesson_1 to lesson_11; lesson 5 is in test_compile_report.py).

Runs on a GPU, or in Triton's interpreter if there is none.
"""

import contextlib
import itertools
import math

import grpo_kernels
import pytest
import torch
from grpo_kernels import config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprob import data, gradients, truth

from grpo import advantage as reference_advantage
from grpo import logprob as reference_logprob
from grpo import loss as reference_loss

if not torch.cuda.is_available() and not config.INTERPRETED:
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from grpo_kernels import advantage, linear, loss, selected, torch_backend, triton_backend
from grpo_kernels.advantage import group_advantage
from grpo_kernels.linear import linear_logprob
from grpo_kernels.loss import grpo_loss
from grpo_kernels.selected import selected_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf


def put(*tensors):
    """Copies on the device under test, as leaves that require gradients where they are floats."""
    return [t.detach().to(DEVICE).requires_grad_(t.is_floating_point()) for t in tensors]


class Watched:
    """A kernel that passes the grid of each launch to `report`."""

    def __init__(self, kernel, report):
        self.kernel, self.report = kernel, report

    def __getitem__(self, grid):
        self.report(grid)
        return self.kernel[grid]


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """Small shapes then have several strips, chunks and blocks, of one or two tiles each."""
    width = 64 if config.INTERPRETED else 256
    monkeypatch.setattr(linear, "STRIP", width)
    monkeypatch.setattr(linear, "CHUNK", width)
    monkeypatch.setattr(loss, "BLOCK", 16)


# --- values and gradients -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    # M: none, one, and on both sides of the interpreter's blocks of 16; H: one, less, equal and more than a
    # block of 16; V: one, across blocks of 32 and strips of 64
    shape=st.tuples(st.sampled_from([0, 1, 5, 17, 33]), st.sampled_from([1, 7, 16, 40]), st.integers(1, 150)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1.0, 0.6]),
            "softcap": st.sampled_from([None, 2.0]),
            "entropy": st.booleans(),
        }
    ),
    masks=st.none() | st.lists(st.booleans(), min_size=33, max_size=33),
)
def test_equals_the_reference(shape, dtype, options, masks):
    hidden, weight, ids, upstream = data(*shape, dtype)
    hidden, weight, ids, upstream = put(hidden, weight, ids, upstream)
    mask = None if masks is None else torch.tensor(masks[: shape[0]], dtype=torch.bool, device=DEVICE)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    for name, inputs in (("linear_logprob", (hidden, weight)), ("selected_logprob", (logits,))):
        ours = getattr(triton_backend, name)(*inputs, ids, mask=mask, **options)
        right = getattr(torch_backend, name)(*inputs, ids, mask=mask, **options)
        torch.testing.assert_close(ours, right, **tolerance)
        torch.testing.assert_close(
            gradients(ours, upstream, inputs), gradients(right, upstream, inputs), **tolerance
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, ids, _ = data(3, 2, 5)
    hidden, weight, ids = put(hidden, weight, ids)
    mask = torch.tensor([True, False, True], device=DEVICE)
    options = {"mask": mask, "temperature": 0.7, "softcap": softcap, "entropy": True}
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, ids, **options), (hidden, weight))
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selected_logprob(x, ids, **options), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_twice_pytorchs_error(dtype):
    """On the same rounded inputs. The interpreter truncates bfloat16 on stores; the budget covers that."""
    hidden, weight, ids, upstream = data(50, 64, 300, dtype, scale=0.3)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = truth(exact_inputs[0] @ exact_inputs[1].T, ids, 0.9)
    eager = truth((hidden @ weight.T).float(), ids, 0.9)
    exact += gradients(exact, upstream, exact_inputs)
    eager += gradients(eager, upstream, (hidden, weight))
    h, w, i, u = put(hidden, weight, ids, upstream)
    ours = linear_logprob(h, w, i, temperature=0.9, entropy=True)
    ours += gradients(ours, u, (h, w))
    for name, x, y, z in zip(("logprob", "entropy", "dhidden", "dweight"), ours, eager, exact, strict=True):
        assert (x.cpu() - z).norm() <= 2 * (y - z).norm(), name


def loss_data(dtype=torch.float64, m=40, completions=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(m, generator=generator, dtype=torch.float64) * 0.5 - 1
    old, ref = (logprobs + 0.4 * torch.randn(m, generator=generator, dtype=torch.float64) for _ in range(2))
    ref[3] = logprobs[3] + 1e-3
    advantages = torch.randn(completions, generator=generator, dtype=torch.float64)
    sequence_ids = torch.randint(completions - 1, (m,), generator=generator)  # the last has no token
    mask = torch.rand(m, generator=generator) > 0.3
    logprobs, old, ref, advantages = (x.to(dtype) for x in (logprobs, old, ref, advantages))
    return [x.to(DEVICE) for x in (logprobs, old, ref, advantages, sequence_ids, mask)]


SETTINGS = [
    {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "use_bias_correction_kl": correction,
        "delta": delta,
        "beta": beta,
        "epsilon_high": high,
        "max_completion_length": 6,
    }
    for loss_type, level, correction, (delta, beta, high) in itertools.product(
        reference_loss.LOSS_TYPES,
        reference_loss.LEVELS,
        (False, True),
        [(None, 0.0, None), (1.3, 0.05, 0.28), (None, 0.05, 5.0)],
    )
    if not (loss_type == "cispo" and delta is not None)
]


@pytest.mark.parametrize("on_policy", [False, True])
def test_loss_equals_the_reference_for_every_setting(on_policy):
    logprobs, old, ref, advantages, sequence_ids, mask = loss_data()
    logprobs.requires_grad_()
    for options in SETTINGS:
        results = []
        for backend in (triton_backend, torch_backend):
            value, metrics = backend.grpo_loss(
                logprobs, None if on_policy else old, ref, advantages, sequence_ids, mask=mask, **options
            )
            results.append((value, torch.autograd.grad(value, logprobs)[0], metrics))
        (ours, gradient, metrics), (right, right_gradient, right_metrics) = results
        # In float64 the reference's series for the KL is one term short, hence the tolerances.
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12, msg=str(options))
        torch.testing.assert_close(gradient, right_gradient, rtol=1e-9, atol=1e-11, msg=str(options))
        torch.testing.assert_close(metrics, right_metrics, rtol=1e-6, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_gradcheck(level):
    logprobs, old, ref, advantages, sequence_ids, mask = loss_data(m=12, completions=4)
    logprobs.requires_grad_()
    options = {
        "mask": mask,
        "beta": 0.05,
        "delta": 1.5,
        "importance_sampling_level": level,
        "loss_type": "grpo",
    }
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ref, advantages, sequence_ids, **options)[0], (logprobs,), eps=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_probs_give_the_reference_and_finite_gradients(dtype, monkeypatch):
    """Every setting at log-ratios of 0 to 10,000 nats and tokens of probability 0."""
    monkeypatch.setattr(loss, "BLOCK", 128)  # two programs and not twelve, which would take a minute
    rows = list(itertools.product([0.0, 1.0, -1e3], *[[0.0, -1.0, -101.0, -INF]] * 3))
    advantages, logprobs, old, ref = torch.tensor(rows, dtype=dtype, device=DEVICE).T.contiguous()
    logprobs.requires_grad_()
    sequence_ids = torch.arange(len(rows), device=DEVICE) // 4
    # bnpo and dr_grpo run the same kernel as dapo; only the denominator, a number, is another.
    for options in [each for each in SETTINGS if each["loss_type"] not in ("bnpo", "dr_grpo")]:
        results = []
        for backend in (triton_backend, torch_backend):
            value, metrics = backend.grpo_loss(logprobs, old, ref, advantages[::4], sequence_ids, **options)
            results.append((value, torch.autograd.grad(value, logprobs)[0], metrics))
        (ours, gradient, metrics), (right, right_gradient, right_metrics) = results
        assert ours.isfinite() and gradient.isfinite().all(), options
        assert all(value.isfinite() for value in metrics.values()), options
        exact = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours, right, rtol=exact, atol=0, msg=str(options))
        # The gradient of k3 times the ratio is a difference of numbers of up to exp(15) times the ratio.
        loose = 1e-9 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(gradient, right_gradient, rtol=loose, atol=1e-7, msg=str(options))
        torch.testing.assert_close(metrics, right_metrics, rtol=exact, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("poison", [200.0, math.nan])
@pytest.mark.parametrize("correction", [False, True], ids=["k3", "k3 times ratio"])
@pytest.mark.parametrize("level", reference_loss.LEVELS)
def test_beta_zero_ignores_the_reference(level, correction, poison):
    logprobs, old, ref, advantages, sequence_ids, mask = loss_data(torch.float32)
    mask[5] = True
    ref[5] = logprobs[5] + poison
    logprobs.requires_grad_()
    options = {"mask": mask, "beta": 0.0, "importance_sampling_level": level}
    options["use_bias_correction_kl"] = correction
    results = []
    for backend, reference in ((triton_backend, ref), (torch_backend, ref), (triton_backend, None)):
        value, metrics = backend.grpo_loss(logprobs, old, reference, advantages, sequence_ids, **options)
        results.append((value, torch.autograd.grad(value, logprobs)[0], metrics))
    ours, right, without = results
    assert ours[0].isfinite() and ours[1].isfinite().all()
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not ours[2]["kl"] < 1e4  # the metric still shows the KL
    assert torch.equal(ours[0], without[0]) and torch.equal(ours[1], without[1])


def test_kl_of_close_policies_keeps_its_digits():
    logprobs = torch.full((1,), -1.0, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    for x in (1e-4, 3e-2, 0.25, 0.9, -0.9, 1.5, -3.0):
        _, metrics = grpo_loss(
            logprobs, None, logprobs + x, one, torch.zeros(1, dtype=torch.int64, device=DEVICE)
        )
        exact = (logprobs + x).double() - logprobs.double()
        exact = exact.expm1() - exact
        assert metrics["kl"].item() == pytest.approx(exact.item(), rel=1e-6 if abs(x) > 1e-3 else 1e-3)


@settings(max_examples=10, deadline=None)
@given(
    episodes=st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0]), st.sampled_from([-7, 0, 3, 2**40])),
        max_size=40,
    ),
    scale=st.sampled_from(["group", "batch", "none"]),
    ddof=st.sampled_from([0, 1]),
)
def test_advantages_equal_the_reference(episodes, scale, ddof):
    rewards = torch.tensor([r for r, _ in episodes], dtype=torch.float64, device=DEVICE)
    groups = torch.tensor([g for _, g in episodes], dtype=torch.int64, device=DEVICE)
    ours = group_advantage(rewards, groups, scale=scale, ddof=ddof)
    right = reference_advantage.group_advantage(rewards, groups, scale=scale, ddof=ddof)
    torch.testing.assert_close(ours, right)
    assert torch.equal(ours == 0, right == 0)  # exactly 0 in groups of one and of equal rewards


# --- fused_grpo ---------------------------------------------------------------------------------------------


def fused_data(dtype=torch.float64):
    hidden, weight, ids, _ = data(24, 6, 70, dtype)
    hidden, weight, ids = put(hidden, weight, ids)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.5], dtype=dtype, device=DEVICE)
    groups = torch.tensor([4, 9, 4, 9, 4, 9], device=DEVICE)
    sequences = torch.arange(24, device=DEVICE) % 6
    return hidden, weight, ids, rewards, groups, sequences


@pytest.mark.parametrize("given", [False, True], ids=["on-policy", "old and reference given"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fused_equals_the_four_references(given, level):
    hidden, weight, ids, rewards, groups, sequences = inputs = fused_data()
    mask = torch.arange(24, device=DEVICE) % 5 != 0
    plain, _ = reference_logprob.linear_logprob(hidden, weight, ids, mask=mask, temperature=0.8)
    old, ref = (plain.detach() + 0.3, plain.detach() - 0.1) if given else (None, None)
    options = {"mask": mask, "beta": 0.05 if given else 0.0, "importance_sampling_level": level}
    value, metrics = triton_backend.fused_grpo(
        *inputs, old_logprobs=old, ref_logprobs=ref, temperature=0.8, scale="batch", **options
    )
    advantages = reference_advantage.group_advantage(rewards, groups, scale="batch")
    right, right_metrics = reference_loss.grpo_loss(plain, old, ref, advantages, sequences, **options)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(metrics, right_metrics, check_dtype=False)
    torch.testing.assert_close(
        torch.autograd.grad(value, (hidden, weight)),
        torch.autograd.grad(right, (hidden, weight)),
        atol=1e-9,
        rtol=1e-8,
    )


def test_fused_sweeps_the_vocabulary_once_forward_and_once_backward(monkeypatch):
    launched = []
    for name in ("forward_kernel", "gradient_kernel"):
        watched = Watched(getattr(linear, name), lambda _, name=name: launched.append(name))
        monkeypatch.setattr(linear, name, watched)
    inputs = fused_data()
    value, _ = triton_backend.fused_grpo(*inputs, beta=0.0)
    assert launched == ["forward_kernel"]
    value.backward()
    chunks = math.ceil(70 / linear.CHUNK)  # of the vocabulary; two in the interpreter
    assert launched == ["forward_kernel"] + ["gradient_kernel"] * chunks


def test_everything_masked_is_exactly_zero():
    inputs = fused_data(torch.float32)
    nothing = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    value, metrics = triton_backend.fused_grpo(*inputs, mask=nothing, beta=0.0)
    value.backward()
    assert value == 0 and all(metric == 0 for metric in metrics.values())
    assert (inputs[0].grad == 0).all() and (inputs[1].grad == 0).all()


def test_differences_whose_squares_underflow_are_no_advantages():
    rewards = torch.tensor([0.0, 1e-30], device=DEVICE)
    assert group_advantage(rewards, torch.zeros_like(rewards, dtype=torch.int64), eps=0.0).tolist() == [0, 0]


def test_groups_of_one_and_no_tokens():
    assert group_advantage(torch.ones(3, device=DEVICE), torch.arange(3, device=DEVICE)).tolist() == [0, 0, 0]
    empty = torch.zeros(0, device=DEVICE)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    value, _ = grpo_loss(empty, None, None, torch.ones(2, device=DEVICE), ids, beta=0.0)
    assert value == 0
    assert group_advantage(empty, ids).shape == (0,)


# --- the lessons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 31, 63, 65, 97])
def test_lesson_1_no_phantom_columns_in_a_ragged_last_tile(v):
    """The logits are far below 0, so a column of 0 beyond V would take all the probability."""
    hidden = torch.ones(3, 4, device=DEVICE)
    weight = torch.full((v, 4), -25.0, device=DEVICE)
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for logprobs, _ in (linear_logprob(hidden, weight, ids), selected_logprob(hidden @ weight.T, ids)):
        torch.testing.assert_close(
            logprobs, torch.full((3,), -math.log(v), device=DEVICE), rtol=1e-4, atol=1e-5
        )
        assert (logprobs <= 0).all()


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_lesson_2_logits_far_from_zero(offset):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 150, generator=generator).mul_(8).round_().div_(8).to(DEVICE)
    ids = torch.randint(150, (5,), generator=generator).to(DEVICE)
    shifted = selected_logprob(logits + offset, ids, entropy=True)
    for ours, right in zip(shifted, selected_logprob(logits, ids, entropy=True), strict=True):
        assert torch.equal(ours, right)
    # The same through the product: one more feature of 1, whose weight is `offset` for every token.
    hidden, weight = torch.randn(5, 3, generator=generator), torch.randn(150, 3, generator=generator)
    one = torch.cat([hidden, torch.ones(5, 1)], 1).to(DEVICE)
    far = torch.cat([weight, torch.full((150, 1), offset)], 1).to(DEVICE)
    moved, _ = linear_logprob(one, far, ids)
    plain, _ = linear_logprob(hidden.to(DEVICE), weight.to(DEVICE), ids)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-3)


def test_lesson_3_weight_gradient_error_does_not_grow_with_chunks(monkeypatch):
    tile = linear.blocks(torch.bfloat16, "gradient", tma=True)["BLOCK_N"]
    hidden, weight, ids, upstream = data(200, 16, 2 * tile, torch.bfloat16, scale=0.3)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = gradients(truth(exact_inputs[0] @ exact_inputs[1].T, ids)[:1], upstream[:1], exact_inputs)
    h, w, i, u = put(hidden, weight, ids, upstream)
    errors = {}
    for chunk in (2 * tile, tile):
        monkeypatch.setattr(linear, "CHUNK", chunk)
        ours = gradients(linear_logprob(h, w, i)[:1], u[:1], (h, w))
        errors[chunk] = [(x.cpu() - y).norm() / y.norm() for x, y in zip(ours, exact, strict=True)]
    for few, many in zip(errors[2 * tile], errors[tile], strict=True):
        assert many < 1.2 * few and many < 0.01


def test_lesson_4_gradient_of_a_nearly_certain_token():
    logits = torch.tensor([[math.log(0.999 / 0.001), 0.0]], device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        selected_logprob(logits, torch.zeros(1, dtype=torch.int64, device=DEVICE))[0], logits
    )
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[0.001, -0.001]]), rtol=2e-4, atol=0)


def launch_all(monkeypatch, report):
    """Launches every kernel at least once, with `report` called before each launch."""
    modules = [(m, n) for m in (linear, selected, loss) for n in dir(m) if n.endswith("_kernel")]
    modules.append((advantage, "advantage_kernel"))
    launched = set()
    for module, name in modules:

        def watched(grid, name=name):
            launched.add(name)
            report(grid)

        monkeypatch.setattr(module, name, Watched(getattr(module, name), watched))
    inputs = fused_data()
    value, _ = triton_backend.fused_grpo(*inputs, beta=0.0, importance_sampling_level="sequence")
    value.backward()
    logits = (inputs[0] @ inputs[1].T).detach().requires_grad_()
    selected_logprob(logits, inputs[2])[0].sum().backward()
    assert launched == {name for _, name in modules}


def test_lesson_6_grids_have_one_dimension(monkeypatch):
    """The second dimension of a CUDA grid ends at 65,535; there can be more row blocks."""
    grids = []
    launch_all(monkeypatch, grids.append)
    assert all(len(grid) == 1 for grid in grids)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device; PyTorch's context that changes it is watched, not entered."""
    devices, at_launch = [], []

    @contextlib.contextmanager
    def device_of(x):
        devices.append(x.device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch_all(monkeypatch, lambda _: at_launch.append(devices[-1:]))
    assert at_launch and all(found and found[0].type == DEVICE for found in at_launch)
    assert devices == []


def test_lesson_7_offsets_beyond_32_bits():
    """Rows are 2**30 elements apart, so the third begins at 2**31. Few pages of that memory are touched."""
    stride, v = 2**30, 40
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 5 * stride:
        pytest.skip("needs 5 GiB on the GPU")
    storage = torch.empty(2 * stride + v, dtype=torch.float16, device=DEVICE)
    logits = storage.as_strided((3, v), (stride, 1))
    values = torch.randn(3, v, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    logits.copy_(values)
    ids = torch.tensor([3, 39, 7], device=DEVICE)
    torch.testing.assert_close(selected_logprob(logits, ids), selected_logprob(values, ids))
    weight = torch.randn(9, v).half().to(DEVICE)
    far = linear_logprob(logits, weight, ids % 9)
    torch.testing.assert_close(far, linear_logprob(values, weight, ids % 9))


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_lesson_8_masked_rows_are_never_read(poison):
    hidden, weight, ids, upstream = data(40, 6, 70, torch.float32)
    mask = torch.arange(40) % 3 != 1
    results = []
    for value, bad_id in ((0.0, 0), (poison, -1)):
        h, w, i, u = put(hidden, weight, ids, upstream)
        with torch.no_grad():
            h[~mask] = value
            i[~mask] = bad_id
        outputs = linear_logprob(h, w, i, mask=mask.to(DEVICE), entropy=True)
        logits = torch.where(mask.to(DEVICE)[:, None], h @ w.T, value).detach().requires_grad_()
        selected = selected_logprob(logits, i, mask=mask.to(DEVICE), entropy=True)
        results.append(
            [*outputs, *gradients(outputs, u, (h, w)), *selected, *gradients(selected, u, (logits,))]
        )
        for tensor in results[-1]:
            assert tensor.isfinite().all()
            if len(tensor) == 40:
                assert (tensor[~mask] == 0).all()
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_lesson_9_and_11_two_runs_are_bit_equal():
    hidden, weight, ids, upstream = data(70, 16, 150, torch.bfloat16)
    h, w, i, u = put(hidden, weight, ids, upstream)
    runs = []
    for _ in range(2):
        outputs = linear_logprob(h, w, i, entropy=True)
        runs.append([*outputs, *gradients(outputs, u, (h, w))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_lesson_10_rows_without_upstream_gradient_are_skipped():
    hidden, weight, ids, _ = data(20, 6, 70, torch.float32)
    h, w, i = put(hidden, weight, ids)
    up = torch.zeros(20, device=DEVICE)
    up[[3, 17]] = torch.tensor([1.0, -2.0], device=DEVICE)
    kept = up != 0
    with_all = torch.autograd.grad(linear_logprob(h, w, i)[0], (h, w), up)
    few = h.detach()[kept].requires_grad_()
    alone = torch.autograd.grad(linear_logprob(few, w, i[kept])[0], (few, w), up[kept])
    assert torch.equal(with_all[0][kept], alone[0]) and torch.equal(with_all[1], alone[1])
    assert (with_all[0][~kept] == 0).all()


def test_lesson_11_a_row_does_not_depend_on_the_others():
    hidden, weight, ids, upstream = data(50, 16, 150, torch.float32)
    h, w, i, u = put(hidden, weight, ids, upstream)
    everything = linear_logprob(h, w, i, entropy=True)
    # In the interpreter a product is of NumPy, which on some CPUs rounds a row by its place in the tile:
    # there, rows keep their places in tiles of 16 rows and more.
    first, last = (16, 48) if DEVICE == "cpu" else (13, 49)
    for rows in (slice(0, 1), slice(first, 30), slice(last, 50)):
        few = linear_logprob(h[rows], w, i[rows], entropy=True)
        assert torch.equal(everything[0][rows], few[0]) and torch.equal(everything[1][rows], few[1])
    # dW does not change when masked rows are inserted.
    spread = torch.zeros(100, 16, device=DEVICE)
    spread[::2] = h.detach()
    twice, mask = (
        torch.zeros(100, dtype=torch.int64, device=DEVICE),
        torch.arange(100, device=DEVICE) % 2 == 0,
    )
    twice[::2] = i
    up = torch.zeros(100, device=DEVICE)
    up[::2] = u[0].float()
    (wide,) = torch.autograd.grad(linear_logprob(spread, w, twice, mask=mask)[0], w, up)
    (narrow,) = torch.autograd.grad(linear_logprob(h.detach(), w, i)[0], w, u[0].float())
    assert torch.equal(wide, narrow)


def test_entropy_with_minus_infinity():
    logits = torch.tensor(
        [[0.0, -INF, 1.0, -INF], [-INF, -INF, 2.0, -INF]], device=DEVICE, requires_grad=True
    )
    ids = torch.tensor([0, 2], device=DEVICE)
    logprobs, entropy = selected_logprob(logits, ids, entropy=True)
    torch.testing.assert_close((logprobs, entropy), truth(logits, ids))
    (gradient,) = torch.autograd.grad(entropy.sum() + logprobs.sum(), logits)
    assert gradient.isfinite().all()


# --- autograd, compilation ----------------------------------------------------------------------------------


def test_second_derivatives_are_refused():
    hidden, weight, ids, _ = data(4, 3, 5)
    hidden, weight, ids = put(hidden, weight, ids)
    logprobs, _ = linear_logprob(hidden, weight, ids)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    values, _, _, advantages, sequence_ids, _ = loss_data()
    values.requires_grad_()
    value, _ = grpo_loss(values, None, None, advantages, sequence_ids, beta=0.0)
    (gradient,) = torch.autograd.grad(value, values, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(wanted):
    hidden, weight, ids, _ = data(4, 3, 5)
    inputs = [
        x.detach().to(DEVICE).requires_grad_(wants) for x, wants in zip((hidden, weight), wanted, strict=True)
    ]
    linear_logprob(*inputs, ids.to(DEVICE))[0].sum().backward()
    assert [x.grad is not None for x in inputs] == list(wanted)


def test_opcheck():
    hidden, weight, ids, _ = data(5, 3, 7, torch.float32)
    hidden, weight, ids = put(hidden, weight, ids)
    mask = torch.tensor([True, False, True, True, True], device=DEVICE)
    torch.library.opcheck(linear.linear_forward, (hidden, weight, ids, mask, 0.7, None, True))
    torch.library.opcheck(linear.linear_forward, (hidden, weight, ids, None, 1.0, 2.0, False))
    logits = (hidden @ weight.T).detach().requires_grad_()
    torch.library.opcheck(selected.selected_forward, (logits, ids, mask, 0.7, None, True))
    rewards, groups = torch.rand(5, device=DEVICE), torch.tensor([1, 1, 2, 2, 2], device=DEVICE)
    torch.library.opcheck(advantage._advantage, (rewards, groups, "group", 1, 1e-4))
    values, old, ref, advantages, sequence_ids, some = loss_data(torch.float32)
    values.requires_grad_()
    options = (0.2, 0.2, None, 0.05, "grpo", True, True, None, None, None)
    torch.library.opcheck(loss.loss_forward, (values, old, ref, advantages, sequence_ids, some, *options))


def test_torch_compile_takes_it_whole():
    inputs = fused_data(torch.float32)

    def step(hidden, weight, *rest):
        value, metrics = triton_backend.fused_grpo(hidden * 2, weight, *rest, beta=0.0, temperature=0.9)
        return value * 3, metrics["ratio/mean"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        value, ratio = function(*inputs)
        results.append((value, ratio, *torch.autograd.grad(value, inputs[:2])))
    torch.testing.assert_close(results[1], results[0])


# --- arguments ----------------------------------------------------------------------------------------------


def test_views_and_small_ids():
    hidden, weight, ids, _ = data(20, 6, 70, torch.float32)
    hidden, weight, ids = put(hidden, weight, ids)
    right = linear_logprob(hidden, weight, ids)[0]
    wide, tall = torch.zeros(20, 12, device=DEVICE), torch.zeros(6, 140, device=DEVICE)
    wide[:, ::2], tall[:, ::2] = hidden.detach(), weight.detach().T
    ours = linear_logprob(wide[:, ::2], tall[:, ::2].T, ids.to(torch.int32))[0]
    assert torch.equal(ours, right)
    logits = (hidden @ weight.T).detach()
    assert torch.equal(selected_logprob(logits.T.contiguous().T, ids)[0], selected_logprob(logits, ids)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_by_descriptor_and_by_pointer(dtype):
    """Rows of the padded weight do not begin at multiples of 16 bytes, so it gets no descriptor."""
    # Two blocks of live rows, of features and of tokens at least, the last of each cut short.
    m, v = (150, 600) if DEVICE == "cuda" else (42, 75)
    hidden, weight, ids, upstream = data(m, 40, v, dtype)
    mask = torch.arange(m) % 5 != 2
    hidden = hidden.detach().masked_fill(~mask[:, None], math.nan)
    padded = torch.full((v + 32, 41), math.nan, dtype=dtype)  # what is around W must not be read
    padded[:v, :40] = weight.detach()
    results = []
    for w in (weight.detach().to(DEVICE, copy=True), padded.to(DEVICE)[:v, :40]):
        h, i, u = put(hidden, ids, upstream)
        w.requires_grad_()
        if DEVICE == "cpu" or config.has_tma(dtype):
            assert linear._tma(h, w) == w.is_contiguous()
        outputs = linear_logprob(h, w, i, mask=mask.to(DEVICE), entropy=True)
        results.append([*outputs, *gradients(outputs, u, (h, w))])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
        assert first.isfinite().all()


NOT_FLOAT, ELSEWHERE = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "changes, message",
    {
        "ids": ({"ids": torch.zeros(3, dtype=torch.int64)}, r"ids must be \(2,\) int64 or int32, got \(3,\)"),
        "dtypes": ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, "must have the same dtype"),
        "integers": ({"hidden": NOT_FLOAT[:2], "weight": NOT_FLOAT}, "hidden must be float16"),
        "shapes": ({"weight": torch.zeros(5, 3)}, r"hidden must be \(M, H\) and weight \(V, H\)"),
        "no vocabulary": ({"weight": torch.zeros(0, 4)}, "weight must have at least one row"),
        "mask": ({"mask": torch.ones(2)}, r"mask must be \(2,\) bool"),
        "temperature": ({"temperature": 0.0}, "temperature must be positive"),
        "softcap": ({"softcap": -1.0}, "softcap must be positive or None"),
        "devices": ({"ids": ELSEWHERE}, "all tensors must be on one device, got"),
        "range": ({"ids": torch.tensor([0, 5]), "validate": True}, r"ids must be in \[0, 5\) .*, got 0 to 5"),
    }.values(),
)  # fmt: skip
def test_errors_name_the_argument(changes, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments | changes)


def test_an_id_outside_the_vocabulary_is_not_a_number():
    """Without `validate` nothing waits for the device, and NaN cannot be mistaken for a log-prob."""
    hidden, weight = torch.ones(2, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)
    ids = torch.tensor([1, 5], device=DEVICE)
    for logprobs, _ in (linear_logprob(hidden, weight, ids), selected_logprob(hidden @ weight.T, ids)):
        assert logprobs.isnan().tolist() == [False, True]
    mask = torch.tensor([True, False], device=DEVICE)
    linear_logprob(hidden, weight, ids, mask=mask, validate=True)


def test_loss_errors_are_those_of_the_reference():
    logprobs, _, _, advantages, sequence_ids, _ = loss_data()
    with pytest.raises(ValueError, match="ref_logprobs must be given"):
        grpo_loss(logprobs, None, None, advantages, sequence_ids, beta=0.1)
    with pytest.raises(ValueError, match="delta must be None with loss_type cispo"):
        grpo_loss(logprobs, None, None, advantages, sequence_ids, beta=0.0, delta=1.0, loss_type="cispo")


# --- which backend ------------------------------------------------------------------------------------------


def test_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert grpo_kernels.backend("cpu").NAME == grpo_kernels.backend("mps").NAME == "torch"
    assert grpo_kernels.backend("cuda").NAME == grpo_kernels.backend("cuda:1", "triton").NAME == "triton"
    assert grpo_kernels.backend("cuda", "torch").NAME == "torch"
    with pytest.raises(ValueError, match="kernels must be auto or torch on cpu, got 'triton'"):
        grpo_kernels.backend("cpu", "triton")
    with pytest.raises(ValueError, match="kernels must be auto, torch or triton, got 'cuda'"):
        grpo_kernels.backend("cpu", "cuda")


def test_the_package_serves_cpu_tensors_with_the_references():
    hidden, weight, ids, rewards, groups, sequences = (x.cpu().detach() for x in fused_data())
    value, _ = grpo_kernels.fused_grpo(hidden, weight, ids, rewards, groups, sequences, beta=0.0)
    logprobs, _ = grpo_kernels.linear_logprob(hidden, weight, ids, temperature=1.0)
    selected, _ = grpo_kernels.selected_logprob(hidden @ weight.T, ids)
    torch.testing.assert_close(logprobs, selected)
    advantages = grpo_kernels.group_advantage(rewards, groups)
    again, _ = grpo_kernels.grpo_loss(logprobs, None, None, advantages, sequences, beta=0.0)
    assert torch.equal(value, again)
