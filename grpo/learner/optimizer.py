"""AdamW on float32 master weights, and the learning-rate schedules.

AdamW is Loshchilov and Hutter, arXiv 1711.05101; the arithmetic is torch.optim.AdamW (fused where the device
has it). A learning rate of 5e-7 is far below the spacing of bfloat16 numbers, so 16-bit parameters are never
stepped: each has a float32 master and a float32 gradient buffer, and is overwritten with the rounded master
after every update. Parameters that are float32 already are their own masters.

sharded.py has the variants for several ranks. Left out: loss scaling (float16 compute), 8-bit moments,
parameter groups with their own learning rates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "linear", "constant")
MOMENTS = ("exp_avg", "exp_avg_sq")
ADD_BLOCK = 1 << 18  # elements; a block converted to float32 is still in the cache when it is added


def scheduled_learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: float, schedule: str
) -> float:
    """Learning rate of one step: linear warmup to `peak`, then the schedule; all but constant end at 0.

    The curves are those of transformers, except that the warmup starts at peak / warmup instead of 0. In a
    short run the paper's 3% are one step, and a step at learning rate 0 would waste its rollout.

    Args:
        step: from 0.
        warmup_steps: a number of steps, or below 1 a ratio of `total_steps` (rounded up).
        schedule: cosine | linear | constant.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    warmup = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class MasterAdamW:
    """The trainable parameters of a model, their float32 masters and gradients, and AdamW's moments.

    The gradient buffers live as long as this object, so a step allocates nothing of the model's size.

    Attributes:
        masters: what AdamW steps, by name. With several ranks, the pieces that this rank owns.
        equal_micro_batches: all ranks must run equally many micro-batches.
    """

    equal_micro_batches = False

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = self._make_masters()
        # Gains and biases are not decayed, as in transformers.
        owned = {name: master for name, master in self.masters.items() if master.numel()}
        decayed = [master for name, master in owned.items() if self.parameters[name].ndim >= 2]
        others = [master for name, master in owned.items() if self.parameters[name].ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.fused = all(m.device.type in ("cpu", "cuda") for m in self.masters.values())
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=self.fused)
        self.num_updates = 0

    def _make_masters(self) -> dict[str, Tensor]:
        """The masters with their gradient buffers."""
        masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        for master in masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return masters

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The float32 gradient buffer of each parameter, by name."""
        return {name: m.grad for name, m in self.masters.items() if m.grad is not None}

    def zero_grad(self) -> None:
        for gradient in self.gradients.values():
            gradient.zero_()  # in place: fresh pages cost more than writing zeros

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """A context in which `backward()` adds all gradients, 16-bit ones included, to the float32 buffers.

        A sum of micro-batches in bfloat16 would lose digits. Each hook fires when its parameter's gradient is
        complete, so few 16-bit gradients exist at a time. The hooks are removed on exit; otherwise a later
        optimiser of the model would never see a gradient.
        """
        handles = [
            self.parameters[name].register_post_accumulate_grad_hook(_move_gradient_to(gradient))
            for name, gradient in self.gradients.items()
            if gradient.dtype != self.parameters[name].dtype
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def grad_norm(self) -> Tensor:
        """() float32: Euclidean norm of the gradient accumulated so far; no device synchronisation."""
        # Row by row: one float32 sum over an embedding's 28 million squares can be wrong in the third digit.
        norm = torch.linalg.vector_norm
        return norm(torch.stack([norm(norm(g, dim=-1)) for g in self.gradients.values()]))

    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks; () the norm of the sum. Comes before `step`."""
        return self.grad_norm()

    def first_non_finite(self) -> str | None:
        """Name of the first parameter, in the model's order, whose gradient holds a NaN or an infinity."""
        return next((name for name, g in self.gradients.items() if not torch.isfinite(g).all()), None)

    @torch.no_grad()
    def step(self, learning_rate: float, *, scale: float = 1.0) -> None:
        """One AdamW update with the accumulated gradient times `scale` (the clipping factor)."""
        if scale != 1.0:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(scale)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.num_updates += 1  # first: an update that fails half-way must not look like none
        self.adamw.step()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def pieces(self) -> dict[str, tuple[int, int]]:
        """Which elements of each flattened parameter this rank's master has: first, end. One rank: empty."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, float32: the live tensors, to be written before the next step."""
        tensors = {f"master.{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            for moment in MOMENTS if self.num_updates else ():
                tensors[f"{moment}.{name}"] = self.adamw.state[master][moment] if master.numel() else master
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Restores what `state()` returned, bit for bit.

        Args:
            tensors: of the masters' shapes, or flattened.
        Raises:
            ValueError: a tensor is missing, unknown or has another shape. Nothing is changed in that case.
        """
        expected = {f"master.{name}": m for name, m in self.masters.items()}
        if num_updates:
            expected |= {f"{moment}.{name}": m for moment in MOMENTS for name, m in self.masters.items()}
        if wrong := sorted(expected.keys() ^ tensors.keys()):
            what = "lacks the" if wrong[0] in expected else "has the unknown"
            raise ValueError(f"the optimiser state {what} tensor {wrong[0]} ({len(wrong)} names differ)")
        for key, like in expected.items():
            if tensors[key].shape not in (like.shape, (like.numel(),)):
                shapes = f"{tuple(like.shape)}, got {tuple(tensors[key].shape)}"
                raise ValueError(f"{key} must have shape {shapes}")
        self.adamw.state.clear()
        for name, master in self.masters.items():
            if not master.numel():
                continue
            master.copy_(tensors[f"master.{name}"].view_as(master))
            if num_updates:
                state = {moment: torch.empty_like(master) for moment in MOMENTS}
                for moment, tensor in state.items():
                    tensor.copy_(tensors[f"{moment}.{name}"].view_as(master))
                # AdamW keeps its step count in a float32 tensor, which is on the device if fused.
                state["step"] = torch.tensor(
                    float(num_updates), device=master.device if self.fused else "cpu"
                )
                self.adamw.state[master] = state
        self.num_updates = num_updates
        self._publish()


def _master(parameter: nn.Parameter) -> Tensor:
    """The parameter itself, or for a 16-bit one a float32 copy."""
    if parameter.dtype in (torch.bfloat16, torch.float16):
        return parameter.detach().to(torch.float32)
    return parameter


def _move_gradient_to(buffer: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            add(buffer, parameter.grad)
        parameter.grad = None

    return hook


def add(total: Tensor, part: Tensor) -> None:
    """total += part, in blocks where torch would first convert all of `part`: other dtypes, on a CPU."""
    if total.device.type != "cpu" or part.dtype == total.dtype:
        total.add_(part)
        return
    for sums, terms in zip(total.view(-1).split(ADD_BLOCK), part.reshape(-1).split(ADD_BLOCK), strict=True):
        sums.add_(terms.to(total.dtype))
