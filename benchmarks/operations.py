"""Operations that this project implements itself on a CPU, each compared with torch's.

    python benchmarks/operations.py                      the shapes of an update of the demo
    python benchmarks/operations.py --dtypes bfloat16 --rounds 50 --threads 1

`attention`: forward and backward of a tree's branches (grpo/model/attention.py); `rms_norm`: forward and
backward (grpo/model/decoder.py); `accumulate`: a 16-bit gradient added to its float32 buffer
(grpo/learner/optimizer.py); `decode`: one layer's attention in a decode step of 64 rows
(grpo/sampler/kv_cache.py), compared with the same without copying the keys; `layer`: a decoder layer without
its attention, forward and backward, compared with the same under torch.compile, which needs a C++ compiler.
Both sides take turns in each round; results are medians of the times and of the ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.measure import DTYPES, command_line, machine, ratio, seconds, summary  # noqa: E402
from scaling import MODELS  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from grpo.learner import optimizer  # noqa: E402
from grpo.model import attention as sdpa  # noqa: E402
from grpo.model import decoder  # noqa: E402
from grpo.model.decoder import Layer, ModelConfig  # noqa: E402
from grpo.sampler.kv_cache import CachedAttention, RowSpan, SlotCache  # noqa: E402

TOKENS, HIDDEN, EPS = 1024, 576, 1e-5  # a micro-batch of the demo
BRANCHES, BRANCH, PROMPT, HEADS, KV_HEADS, SIZE = 4, 110, 117, 9, 3, 64  # a tree of its warm start
WEIGHT = (49152, HIDDEN)
ROWS, GROUP, OWN, CAPACITY = 64, 8, 120, 232  # a decode step of its rollout, half-way through

Pair = tuple[Callable[[], object], Callable[[], object]]  # ours, torch's


def attention(dtype: torch.dtype) -> Pair:
    q, dout = (torch.randn(BRANCHES, HEADS, BRANCH, SIZE).to(dtype) for _ in range(2))
    k, v = (torch.randn(BRANCHES, KV_HEADS, PROMPT + BRANCH, SIZE).to(dtype) for _ in range(2))
    mask = torch.ones(BRANCH, PROMPT + BRANCH, dtype=torch.bool).tril(PROMPT)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return (
        lambda: torch.autograd.grad(sdpa.attention(q, k, v, mask), leaves, dout),
        lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), leaves, dout
        ),
    )


def normalise(dtype: torch.dtype) -> Pair:
    x, dy = (torch.randn(1, TOKENS, HIDDEN).to(dtype) for _ in range(2))
    leaves = [x.requires_grad_(), torch.rand(HIDDEN).to(dtype).requires_grad_()]
    return (
        lambda: torch.autograd.grad(decoder.rms_norm(*leaves, EPS), leaves, dy),
        lambda: torch.autograd.grad(F.rms_norm(x, (HIDDEN,), leaves[1], EPS), leaves, dy),
    )


def accumulate(dtype: torch.dtype) -> Pair:
    total, part = torch.zeros(WEIGHT), torch.randn(WEIGHT).to(dtype)
    return lambda: optimizer.add(total, part), lambda: total.add_(part)


def decode(dtype: torch.dtype) -> Pair:
    config = ModelConfig.from_hf({**MODELS["135M"], "num_hidden_layers": 1})
    prefixes, private = (SlotCache(config, dtype=dtype, device=torch.device("cpu")) for _ in range(2))
    prefixes.allocate(ROWS // GROUP, PROMPT)
    private.allocate(ROWS, CAPACITY)
    rows = [RowSpan(row // GROUP, PROMPT, OWN - 1, 1) for row in range(ROWS)]
    copied, uncopied = (CachedAttention(prefixes, private, rows, []) for _ in range(2))
    uncopied.copy_keys = False
    q = torch.randn(1, HEADS, ROWS, SIZE).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, ROWS, SIZE).to(dtype) for _ in range(2))
    return (
        torch.inference_mode()(lambda: copied(0, q, k, v)),
        torch.inference_mode()(lambda: uncopied(0, q, k, v)),
    )


def layer(dtype: torch.dtype) -> Pair:
    config = ModelConfig.from_hf({**MODELS["135M"], "num_hidden_layers": 1})
    ours = Layer(config, 0).to(dtype)
    compiled = torch.compile(ours, dynamic=True)  # micro-batches have many lengths
    x, dy = (torch.randn(1, TOKENS, HIDDEN).to(dtype) for _ in range(2))
    tables = config.rope.tables(torch.arange(TOKENS)[None], dtype)
    leaves = [x.requires_grad_(), *ours.parameters()]

    def differentiated(module: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x, *tables, lambda index, q, k, v: q), leaves, dy)

    start = time.perf_counter()
    differentiated(compiled)()
    print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return differentiated(ours), differentiated(compiled)


OPERATIONS = {
    "attention": attention,
    "rms_norm": normalise,
    "accumulate": accumulate,
    "decode": decode,
    "layer": layer,
}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=OPERATIONS,
        default=[name for name in OPERATIONS if name != "layer"],
        help="(default: all but layer, which needs a C++ compiler)",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(", ".join(f"{key}: {value}" for key, value in machine("cpu").items()))
    print("\n| operation | dtype | ours ms | torch ms | ours / torch |\n|" + "---|" * 5)
    for name in arguments.operations:
        for dtype in arguments.dtypes:
            ours, torchs = OPERATIONS[name](DTYPES[dtype])
            times = seconds({"ours": ours, "torch": torchs}, "cpu", rounds=arguments.rounds)
            cells = [f"{1e3 * summary(times[who])['median']:.2f}" for who in ("ours", "torch")]
            print(
                f"| {name} | {dtype} | "
                + " | ".join(cells)
                + f" | {ratio(times['ours'], times['torch']):.2f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
