"""Writes tensors as safetensors files: block by block, hashed on the way, in shards of at most 5 GB.

A checkpoint of a large model is tens of gigabytes, and it is written while the next step samples. The writer
therefore takes host memory for one block only, computes the sha256 of what it writes instead of reading it
again, and lets other threads run. The library's `save_file` needs all tensors of a file on the CPU, and the
file must be read again for its sum; its `save` also builds the file in memory, and holds Python's lock
meanwhile.

A file (https://huggingface.co/docs/safetensors) is the length of its header in 8 bytes, the header in JSON,
and the bytes of the tensors. Ours are byte-equal to those of `save_file`.

Left out: dtypes other than the four below, big-endian machines, reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9  # the Hub's usual shard size
BLOCK_BYTES = 1 << 26
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class ShardWriter:
    """Writes tensors to files and remembers the sha256 of each file.

    Args:
        before_block: called before each block is written; an exception in it ends the writing.
    Attributes:
        sums: path -> sha256, of every file written so far.
    """

    def __init__(self, before_block: Callable[[], None] = lambda: None) -> None:
        self.before_block = before_block
        self.sums: dict[Path, str] = {}
        self._buffer: Tensor | None = None

    def write(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        stem: str,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        sharded: bool = True,
    ) -> dict[str, str]:
        """Writes STEM.safetensors or, if that would be too large, STEM-00001-of-00002.safetensors and so on.

        Args:
            tensors: on any device, in any layout; they are only read, the shards follow their order.
            dtype: of the stored tensors; default: that of each tensor.
            metadata: strings for the header of each file.
            sharded: False: one file, however large.
        Returns:
            the file name of each tensor.
        Raises:
            ValueError: a dtype that is not in DTYPES.
        """
        sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
        shards = _split(sizes) if sharded else [list(tensors)]
        files: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{stem}{part}.safetensors"
            self._write_file(folder / file, {name: tensors[name] for name in names}, dtype, metadata)
            files |= dict.fromkeys(names, file)
        return files

    def _write_file(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        # The library's order: largest items first, so that every tensor is aligned; then by name.
        names = sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))
        start = _header({name: tensors[name] for name in names}, dtype, metadata)
        digest = hashlib.sha256(start)
        with open(path, "wb") as file:
            file.write(start)
            for name in names:
                for block in self._blocks(tensors[name], dtype or tensors[name].dtype):
                    self.before_block()
                    digest.update(block)
                    file.write(block)
        self.sums[path] = digest.hexdigest()

    def _blocks(self, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
        """The bytes of a tensor in row-major order; each block is valid until the next one.

        What lies in host memory as it is stored is not copied. Everything else goes through one buffer.
        """
        flat = tensor.detach().reshape(-1)
        for block in flat.split(BLOCK_BYTES // dtype.itemsize):
            if block.device.type != "cpu" or block.dtype != dtype or not block.is_contiguous():
                if self._buffer is None:
                    self._buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=block.is_cuda)
                staged = self._buffer[: block.numel() * dtype.itemsize].view(dtype)
                block = staged.copy_(block)
            yield block.view(torch.uint8).numpy().data


def _split(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in as few groups of at most SHARD_BYTES as possible.

    There is at least one group. A tensor that is larger gets a group of its own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _header(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> bytes:
    """The bytes of a file before the first tensor."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        stored = dtype or tensor.dtype
        if stored not in DTYPES:
            raise ValueError(f"{name} must have a dtype of {', '.join(map(str, DTYPES))}, got {stored}")
        begin, end = end, end + tensor.numel() * stored.itemsize
        header[name] = {"dtype": DTYPES[stored], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
