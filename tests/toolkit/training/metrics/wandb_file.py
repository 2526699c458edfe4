"""Reading of a `.wandb` file: records of protocol buffers in blocks of 32 KiB, as in a log of LevelDB."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 1 << 15
_FILE_HEADER, _HEADER = 7, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> list[Record]:
    """The records of a file, in order."""
    data, at, complete, result = path.read_bytes(), _FILE_HEADER, b"", []
    assert data[:4] == b":W&B"
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            break
        piece = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        complete = piece if kind in (_FULL, _FIRST) else complete + piece
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(complete)
            result.append(record)
    return result


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged at each step, with wandb's own keys, in order of writing."""
    return [_values(one.history.item) for one in records(path) if one.WhichOneof("record_type") == "history"]


def summary(path: Path) -> dict[str, Any]:
    """The last values."""
    last: dict[str, Any] = {}
    for one in records(path):
        if one.WhichOneof("record_type") == "summary":
            last |= _values(one.summary.update)
    return last


def configuration(path: Path) -> dict[str, Any]:
    """The configuration with which the run began, and its updates."""
    result: dict[str, Any] = {}
    for one in records(path):
        kind = one.WhichOneof("record_type")
        if kind == "run":
            result |= _values(one.run.config.update)
        elif kind == "config":
            result |= _values(one.config.update)
    return result
