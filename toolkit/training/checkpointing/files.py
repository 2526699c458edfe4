"""Tensor files of a checkpoint: safetensors, written and checksummed in one pass; only the needed elements are read.

A safetensors file is a JSON header and numbers. It contains no code, and no other file of the folder is opened.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.errors import UserError
from shards.files import file_sha256
from toolkit.training.zero.fragments import Fragment

_TYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK = 1 << 24  # bytes hashed and written at once


@dataclass(frozen=True)
class FileInfo:
    """Name, size and checksum of a written file."""

    name: str
    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Write contiguous tensors of the CPU as a safetensors file and sync it to the disk, without a second copy of them.

    Raises:
        OSError: The file cannot be written, e.g. the disk is full; a part of it may be left.
    """
    # By element size, so that each tensor is aligned to its own.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (memoryview(struct.pack("<Q", len(head)) + head), *(_bytes(tensor) for _, tensor in ordered)):
            for first in range(0, len(part), _BLOCK):
                digest.update(part[first : first + _BLOCK])
                file.write(part[first : first + _BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.name, 8 + len(head) + end, digest.hexdigest())


def problem_of(folder: Path, info: FileInfo) -> str | None:
    """Check size, checksum and header of a file; return what is wrong, or None."""
    path = folder / info.name
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"{info.name} has {size:,} bytes instead of {info.bytes:,}"
        if file_sha256(path) != info.sha256:
            return f"{info.name} has another checksum than when it was written"
        with safe_open(path, "pt"):
            return None
    except FileNotFoundError:
        return f"{info.name} is missing"
    except OSError as error:
        return f"{info.name} cannot be read: {error.strerror or error}"
    except SafetensorError:
        return f"{info.name} is not a safetensors file"


def named_tensors(fragment: Fragment) -> dict[str, Tensor]:
    """Return a fragment's tensors by the names that they have in a file."""
    return {f"{part}:{fragment.start}:{fragment.name}": getattr(fragment, part) for part in fragment.parts}


class CheckpointReader:
    """Reads fragments from the files of a checkpoint, written at any world size and ZeRO stage.

    A file is opened (its header read) when a fragment is not in the files opened so far. With a rank's own file first,
    a run that resumes with the same world size and stage opens no other.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Prepare to read; the files are opened in this order."""
        self._paths = list(paths)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # (name, part): start, stop, slice

    def check(self, fragment: Fragment) -> None:
        """Check that all elements of a fragment can be read.

        Raises:
            UserError: The checkpoint does not have them, or the parameter has another shape.
        """
        for part in fragment.parts:
            self._covering(fragment, part)
        shape = self._shapes.get(fragment.name)
        if shape != fragment.shape:
            raise UserError(f"{fragment.name} has shape {shape} in the checkpoint, {fragment.shape} in this model")

    def read_into(self, fragment: Fragment) -> None:
        """Overwrite a fragment's tensors with those of the files; only the needed elements are read."""
        for part in fragment.parts:
            target = getattr(fragment, part)
            for start, stop, piece in self._covering(fragment, part):
                first, last = max(start, fragment.start), min(stop, fragment.stop)
                values = piece[first - start : last - start]
                target[first - fragment.start : last - fragment.start].copy_(values)

    def _covering(self, fragment: Fragment, part: str) -> list[tuple[int, int, Any]]:
        """Return the pieces that overlap a fragment and together cover it."""
        while True:
            pieces = sorted(self._pieces.get((fragment.name, part), []), key=lambda piece: piece[:2])
            needed = [piece for piece in pieces if piece[0] < fragment.stop and fragment.start < piece[1]]
            reached = fragment.start
            for start, stop, _ in needed:
                reached = max(reached, stop) if start <= reached else reached
            if reached >= fragment.stop:
                return needed
            if not self._paths:
                what = f"elements {fragment.start} to {fragment.stop} of {fragment.name} ({part})"
                raise UserError(f"the checkpoint does not hold {what}: it is of another model")
            self._open(self._paths.pop(0))

    def _open(self, path: Path) -> None:
        file = safe_open(path, "pt")
        try:
            self._shapes |= {name: tuple(json.loads(shape)) for name, shape in (file.metadata() or {}).items()}
            for key in file.keys():  # noqa: SIM118  not a mapping
                part, start, name = key.split(":", 2)
                piece = file.get_slice(key)
                (size,) = piece.get_shape()
                self._pieces.setdefault((name, part), []).append((int(start), int(start) + size, piece))
        except (TypeError, ValueError):
            raise UserError(f"{path} does not hold fragments of a model: it is no file of a checkpoint") from None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class PinnedBuffers:
    """Buffers in the CPU's memory, pinned if the tensors are on a GPU, and reused by every save."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors without waiting for the device."""
        copies = {}
        for key, tensor in tensors.items():
            old = self._memory.get((name, key))
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                old = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._memory[name, key] = old
            copies[key] = old.copy_(tensor, non_blocking=True)
        return copies
