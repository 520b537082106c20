"""AdamW for several ranks: each rank owns a share of the masters and moments, and steps that share alone.

    replicate  Weights and gradient sums are whole on every rank (ZeRO stage 1, arXiv 1910.02054). Per step:
               one reduce-scatter of the gradients, one all-gather of the weights.
    fsdp       The weights are sharded too, layer by layer (torch's FSDP2). A rank gathers a layer's weights
               when it needs them, and drops them after it. Per micro-batch: two all-gathers of the weights,
               one reduce-scatter of the gradients.

Both sum over ranks in float32 and divide by nothing: the loss of a micro-batch already has the denominators
of the whole step.

The model does not know about ranks: `shard` changes it from outside. Left out: tensor parallelism, and
sharding inside a machine only (hybrid sharding).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grpo import distributed
from grpo.learner.optimizer import MasterAdamW
from grpo.model.decoder import Decoder

# torch 2.13 has renamed them.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def adamw(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> MasterAdamW:
    """The optimiser that fits the model: on one rank, replicated, or sharded by `shard`."""
    kind = MasterAdamW
    if distributed.size() > 1:
        kind = FullyShardedAdamW if isinstance(model, FSDPModule) else ReplicatedAdamW
    return kind(model, betas=betas, weight_decay=weight_decay)


# --- replicate ----------------------------------------------------------------------------------------------


class ReplicatedAdamW(MasterAdamW):
    """All parameters are parts of one vector; rank r owns the r-th of `size` equal shares of it.

    A share may begin and end inside a parameter. AdamW treats each element alone, so that changes nothing.
    """

    def _make_masters(self) -> dict[str, Tensor]:
        parameters = list(self.parameters.values())
        dtype, device = parameters[0].dtype, parameters[0].device
        exact = torch.promote_types(dtype, torch.float32)
        total = sum(parameter.numel() for parameter in parameters)
        share = -(-total // distributed.size())
        self._first = distributed.rank() * share
        # The model's parameters and their gradients become views of these two vectors.
        self._weights = torch.zeros(share * distributed.size(), dtype=dtype, device=device)
        self._sums = torch.zeros(share * distributed.size(), dtype=exact, device=device)
        self._reduced = torch.zeros(share, dtype=exact, device=device)
        self._own = self._weights[self._first :][:share]
        self._places: dict[str, tuple[int, int]] = {}  # of each parameter in the vectors: first, end
        self._views: dict[str, Tensor] = {}
        end = 0
        for name, parameter in self.parameters.items():
            first, end = end, end + parameter.numel()
            self._places[name] = first, end
            self._weights[first:end].copy_(parameter.detach().view(-1))
            parameter.data = self._weights[first:end].view(parameter.shape)
            self._views[name] = self._sums[first:end].view(parameter.shape)
            if dtype == exact:
                parameter.grad = self._views[name]
        self._master = self._own if dtype == exact else self._own.to(exact)
        masters = {}
        for name, (first, end) in self.pieces().items():
            start = self._places[name][0] + first - self._first
            masters[name] = self._master[start : start + end - first]
            masters[name].grad = self._reduced[start : start + end - first]
        return masters

    def pieces(self) -> dict[str, tuple[int, int]]:
        mine = self._first, self._first + len(self._own)
        return {
            name: (min(max(mine[0], first), end) - first, min(max(mine[1], first), end) - first)
            for name, (first, end) in self._places.items()
        }

    @property
    def gradients(self) -> dict[str, Tensor]:
        """This rank's gradient sums, whole, by name."""
        return self._views

    def reduce(self) -> Tensor:
        with distributed.exchange():
            reduce_scatter(self._reduced, self._sums)
        return _total(torch.linalg.vector_norm(self._reduced, dtype=torch.float64))

    def _publish(self) -> None:
        if self._master is not self._own:
            self._own.copy_(self._master)
        with distributed.exchange():
            all_gather(self._weights, self._own.clone())


def _total(norm: Tensor) -> Tensor:
    """() norm of a vector of which each rank has a share, from the norm of this rank's share.

    Norms are computed in float64: a share may have 10^9 elements.
    """
    return distributed.add_up(norm.square()).sqrt()


# --- fsdp ---------------------------------------------------------------------------------------------------


def shard(model: Decoder, *, dtype: torch.dtype, trained: bool = True) -> Decoder:
    """A copy of `model` whose weights are divided among the ranks. Every rank must have the same `model`.

    Args:
        model: stays as it is.
        dtype: of the computation.
        trained: the shares of what requires a gradient are float32, the masters of the optimiser.
    """
    device = model.output_weight.device
    empty = {}
    for parameter in model.parameters():
        kept = parameter.dtype
        if trained and parameter.requires_grad:
            kept = torch.promote_types(kept, torch.float32)
        meta = torch.empty_like(parameter, device="meta", dtype=kept)
        empty[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    sharded = copy.deepcopy(model, empty)  # takes the parameters from the dict: nothing large is copied
    mesh = init_device_mesh(device.type, (distributed.size(),))
    exact = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root group has the embeddings. The loss multiplies with the output embedding after the forward pass,
    # so they stay gathered until the backward pass has ended.
    fully_shard(sharded, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):  # gloo's average has returned the sum (pytorch #162338)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    sharded.to_empty(device=device)
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            local, first = _rows(parameter), _first_row(parameter)
            local.copy_(whole[name][first : first + len(local)])
    return sharded


def release(model: nn.Module) -> None:
    """Drops the gathered embeddings of a sharded model, for which no backward pass follows that would."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _rows(sharded: Tensor) -> Tensor:
    """This rank's rows of a parameter or gradient, not a copy."""
    assert isinstance(sharded, DTensor)
    return sharded.to_local()


def _first_row(parameter: Tensor) -> int:
    """Where this rank's rows of a parameter begin: ranks have equally many, but for the last ones."""
    rows = len(parameter)
    return min(distributed.rank() * -(-rows // distributed.size()), rows)


class FullyShardedAdamW(MasterAdamW):
    """The parameters are DTensors, sharded by rows; the masters are this rank's rows themselves."""

    equal_micro_batches = True

    def _make_masters(self) -> dict[str, Tensor]:
        return {name: _rows(parameter).detach() for name, parameter in self.parameters.items()}

    def pieces(self) -> dict[str, tuple[int, int]]:
        pieces = {}
        for name, parameter in self.parameters.items():
            row = parameter.numel() // len(parameter)
            first = _first_row(parameter) * row
            pieces[name] = first, first + self.masters[name].numel()
        return pieces

    @property
    def gradients(self) -> dict[str, Tensor]:
        """This rank's rows of the sums over all ranks, by name."""
        return {
            name: _rows(parameter.grad)
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        with distributed.exchange():
            yield  # FSDP adds up the reduced gradients in float32

    def grad_norm(self) -> Tensor:
        device = next(iter(self.masters.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)  # of a rank that has no share
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients.values()]
        return torch.stack([zero, *norms]).norm()

    def reduce(self) -> Tensor:
        gradients = self.gradients
        for name, master in self.masters.items():
            master.grad = gradients[name] if name in gradients else torch.zeros_like(master)
        return _total(self.grad_norm())

    def _publish(self) -> None:
        pass  # the masters are the weights


@torch.no_grad()
def copy_weights(model: Decoder, into: Decoder) -> None:
    """Copies what a sharded model trains into a whole one, tensor by tensor, rounded to its dtype."""
    whole = dict(into.named_parameters())
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    with distributed.exchange():
        for name, parameter in trained:
            rounded = parameter.detach().to(whole[name].dtype)
            assert isinstance(rounded, DTensor)
            whole[name].copy_(rounded.full_tensor())
