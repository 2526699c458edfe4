"""The tensor files of a checkpoint: safetensors, written with their checksum in one pass, read in the pieces needed.

A safetensors file is a JSON header and numbers. Nothing in it is code, and nothing else in the folder is opened.
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
from toolkit.training.zero.slices import Slice

_TYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK = 1 << 24  # bytes hashed and written at once


@dataclass(frozen=True)
class FileInfo:
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Write a safetensors file and wait until it is on the disk; no second copy of the tensors is made on the way.

    Args:
        path: The file.
        tensors: On the CPU, contiguous.
        metadata: Goes into the header.

    Raises:
        OSError: The disk is full, or does not take it for another reason; a part of the file may be left.
    """
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # each at a multiple of its size
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
    """Say what is wrong with a file, if anything is: its size, its checksum, its header."""
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


def tensor_names(fragment: Slice) -> dict[str, Tensor]:
    """A slice's tensors under the names that they have in a file."""
    return {f"{part}:{fragment.start}:{fragment.name}": getattr(fragment, part) for part in fragment.parts}


class CheckpointReader:
    """Slices in the files of a checkpoint, written by any number of ranks at any ZeRO stage.

    A file is opened (its header read) when something is asked for that is not in the files opened so far. With a rank's
    own file first in the list, a run that goes on as it was opens no other.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Prepare to read.

        Args:
            paths: The files in the order in which they are to be tried.
        """
        self._paths = list(paths)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._found: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # (name, part): start, stop, slice

    def check(self, fragment: Slice) -> None:
        """Make sure that a slice can be read whole.

        Raises:
            UserError: The checkpoint does not hold it, or holds a parameter of another shape.
        """
        for part in fragment.parts:
            self._covering(fragment, part)
        shape = self._shapes.get(fragment.name)
        if shape != fragment.shape:
            raise UserError(f"{fragment.name} has shape {shape} in the checkpoint, {fragment.shape} in this model")

    def read_into(self, fragment: Slice) -> None:
        """Overwrite a slice's tensors with what the files hold; only the elements needed are read."""
        for part in fragment.parts:
            target = getattr(fragment, part)
            for start, stop, piece in self._covering(fragment, part):
                first, last = max(start, fragment.start), min(stop, fragment.stop)
                values = piece[first - start : last - start]
                target[first - fragment.start : last - fragment.start].copy_(values)

    def _covering(self, fragment: Slice, part: str) -> list[tuple[int, int, Any]]:
        """The pieces that overlap a slice; together they hold all of it."""
        while True:
            pieces = sorted(self._found.get((fragment.name, part), []), key=lambda piece: piece[:2])
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
                self._found.setdefault((name, part), []).append((int(start), int(start) + size, piece))
        except (TypeError, ValueError):
            raise UserError(f"{path} does not hold fragments of a model: it is no file of a checkpoint") from None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class PinnedBuffers:
    """Copies in the CPU's memory, which is page-locked for a GPU and kept from one save to the next."""

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
