"""Remote shards through fsspec: whole files, ranges and sizes, asked for again when the network fails.

fsspec is imported where a URL is first used. What it needs to reach a service (s3fs, gcsfs, aiohttp, ...) is the user's
to install; fsspec's message says which.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import TransientError, UserError

T = TypeVar("T")

DELAYS = (1.0, 5.0, 20.0, 60.0)  # seconds before an answer that failed is asked for again
BLOCK = 8 << 20  # bytes asked for at a time when a whole file is copied


def is_url(place: Path | str) -> bool:
    """Whether a folder is named by a URL; `file://` too, which lets a shared disk be read through the cache."""
    return isinstance(place, str) and "://" in place


class Remote:
    """A folder behind a URL. It may be used on both sides of a fork."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process = 0
        self._found: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_process": 0, "_found": None}

    def address(self, name: str) -> str:
        """The URL of a file, as errors show it."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """Read a whole small file."""
        return self.patiently(name, lambda system, path: system.cat_file(path))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where the server does not tell."""
        return self.patiently(name, lambda system, path: system.size(path))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on.

        Raises:
            UserError: The file is missing, shorter, or the server sends something else.
        """
        data = self.patiently(name, lambda system, path: system.cat_file(path, start=offset, end=offset + size))
        if len(data) > size:
            raise UserError(
                f"{self.address(name)}: the server does not send parts of files: set --data.cache to a folder"
            )
        if len(data) < size:
            raise UserError(f"{self.address(name)} is shorter than its manifest says: make the shards again")
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """Give a file block by block; to be used inside `patiently`, which knows what to do with errors."""
        system, path = self._system()
        with system.open(f"{path}/{name}", "rb", block_size=BLOCK) as file:
            while block := file.read(BLOCK):
                yield block

    def patiently(self, name: str, ask: Callable[[Any, str], T]) -> T:
        """Call `ask(filesystem, path)` for a file, again and again while the network fails.

        Raises:
            UserError: Missing, refused, or no driver for the URL.
            TransientError: It failed five times.
        """
        for delay in (*DELAYS, None):
            try:
                system, path = self._system()
                return ask(system, f"{path}/{name}")
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
        # A filesystem's threads do not survive a fork: each process makes its own.
        if self._found is None or self._process != os.getpid():
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self.url)
            self._found, self._process = (system, path.rstrip("/")), os.getpid()
        return self._found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
