"""Safetensors files are written block by block: the library's bytes, the right sums, little memory."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.model import shards
from grpo.model.shards import ShardWriter


@pytest.fixture
def small(monkeypatch):
    """Blocks of 64 bytes, shards of 400."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, layouts that are not contiguous; in no order."""
    torch.manual_seed(0)
    return {
        "z": torch.randn(7, 5),
        "a.half": torch.randn(3, 1, 7).bfloat16(),
        "transposed": torch.randn(9, 4).T,
        "double": torch.randn(6, dtype=torch.float64),
        "view": torch.randn(40)[3:30:2],
        "number": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "Größe": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("metadata", [None, {"format": 'of "pt"'}])
def test_the_bytes_are_those_of_the_library(tmp_path, monkeypatch, metadata):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors().items()}
    save_file(plain, tmp_path / "theirs", metadata=metadata)
    (tmp_path / "float16").mkdir()
    halved = {name: tensor.half() for name, tensor in plain.items()}
    save_file(halved, tmp_path / "theirs16", metadata=metadata)

    writer = ShardWriter()
    files = writer.write(tensors(), tmp_path, "ours", metadata=metadata)
    assert files == dict.fromkeys(tensors(), "ours.safetensors")
    writer.write(tensors(), tmp_path / "float16", "ours", dtype=torch.float16, metadata=metadata)
    for ours, theirs in [("ours.safetensors", "theirs"), ("float16/ours.safetensors", "theirs16")]:
        content = (tmp_path / ours).read_bytes()
        assert content == (tmp_path / theirs).read_bytes()
        assert writer.sums[tmp_path / ours] == hashlib.sha256(content).hexdigest()


def test_shards_hold_every_tensor_once_and_are_no_larger_than_allowed(tmp_path, small):
    large = {f"w{index}": torch.full((20 + index,), float(index)) for index in range(12)}
    large["larger than a shard"] = torch.ones(200)
    writer = ShardWriter()
    files = writer.write(large, tmp_path, "state")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"state-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    assert sorted(path.name for path in writer.sums) == names
    for name in names:
        content = load_file(tmp_path / name)
        assert [key for key in large if files[key] == name] == sorted(content, key=list(large).index)
        assert all(torch.equal(content[key], large[key]) for key in content)
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= 400
    assert files.keys() == large.keys()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype, most", [(None, 0), (torch.bfloat16, 1 << 16)])
def test_memory_is_needed_for_one_block_at_most(tmp_path, monkeypatch, dtype, most):
    """As counted on a CPU: a tensor that keeps its dtype is not copied at all."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1 << 16)
    tensors = {"w": torch.ones(1000, 1000), "v": torch.ones(10)}
    with Largest() as largest:
        ShardWriter().write(tensors, tmp_path, "x", dtype=dtype)
    assert largest.most == most


def test_an_exception_before_a_block_ends_the_writing(tmp_path, small):
    calls = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise KeyError

    with pytest.raises(KeyError):
        ShardWriter(stop).write({"w": torch.ones(1000)}, tmp_path, "x")
    assert len(calls) == 3 and Path(tmp_path / "x.safetensors").stat().st_size < 1000


def test_other_dtypes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="counts must have a dtype of torch.float64, .*got torch.int64"):
        ShardWriter().write({"counts": torch.arange(3)}, tmp_path, "x")
    assert not list(tmp_path.iterdir())
