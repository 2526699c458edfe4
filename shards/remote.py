"""Remote shards through fsspec: files, byte ranges and sizes, with retries when the network fails.

fsspec is imported when a URL is first used. The user installs the driver of the service (s3fs, gcsfs, aiohttp, ...);
fsspec's error message names it.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import TransientError, UserError

T = TypeVar("T")

DELAYS = (1.0, 5.0, 20.0, 60.0)  # seconds before each retry
BLOCK = 8 << 20  # bytes per request when a complete file is downloaded


def is_url(location: Path | str) -> bool:
    """Return whether a folder is given by a URL; `file://` is one, to read a shared disk through the cache."""
    return isinstance(location, str) and "://" in location


class Remote:
    """A folder at a URL; safe to use before and after a fork."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process = 0
        self._filesystem: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_process": 0, "_filesystem": None}

    def address(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """Read a complete small file."""
        return self.with_retries(name, lambda system, path: system.cat_file(path))

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if the server does not send it."""
        return self.with_retries(name, lambda system, path: system.size(path))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset`.

        Raises:
            UserError: The file is missing or shorter, or the server does not support range requests.
        """
        data = self.with_retries(name, lambda system, path: system.cat_file(path, start=offset, end=offset + size))
        if len(data) > size:
            raise UserError(
                f"{self.address(name)}: the server does not support range requests: set --data.cache to a folder"
            )
        if len(data) < size:
            raise UserError(f"{self.address(name)} is shorter than in its manifest: make the shards again")
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file block by block; to be used inside `with_retries`, which handles errors."""
        system, path = self._system()
        with system.open(f"{path}/{name}", "rb", block_size=BLOCK) as file:
            while block := file.read(BLOCK):
                yield block

    def with_retries(self, name: str, request: Callable[[Any, str], T]) -> T:
        """Call `request(filesystem, path)` for a file, and retry it while the network fails.

        Raises:
            UserError: The file is missing, access is denied, or there is no driver for the URL.
            TransientError: All attempts failed.
        """
        for delay in (*DELAYS, None):
            try:
                system, path = self._system()
                return request(system, f"{path}/{name}")
            except UserError:
                raise
            except FileNotFoundError:
                raise UserError(f"{self.address(name)} is missing") from None
            except (ImportError, PermissionError, ValueError, TypeError) as error:
                raise UserError(f"{self.address(name)} cannot be read: {_line(error)}") from None
            except Exception as error:  # each driver raises its own
                if delay is None:
                    raise TransientError(
                        f"{self.address(name)} cannot be read after {len(DELAYS) + 1} attempts: {_line(error)}"
                    ) from None
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _system(self) -> tuple[Any, str]:
        # A file system's threads do not survive a fork, so each process creates its own.
        if self._filesystem is None or self._process != os.getpid():
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self.url)
            self._filesystem, self._process = (system, path.rstrip("/")), os.getpid()
        return self._filesystem


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
