"""Pictures and audio files inside other files: members of tars, values of parquet files."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shards.errors import UserError
from shards.remote import is_url

Result = TypeVar("Result")


class StoredFile(ABC):
    """A picture or an audio file inside a container: picklable and hashable, and equal if it is the same one."""

    container: str  # absolute path or URL of the file that it is in
    container_bytes: int  # size of that file
    name: str  # name inside the container
    size: int  # size in bytes

    @abstractmethod
    def read(self) -> bytes:
        """Read it.

        Raises:
            UserError: The container is missing, or shorter than when it was listed.
            TransientError: The disk or the network does not respond.
        """

    def stamp(self) -> tuple[int, int]:
        """Return size in bytes and time of modification in ns of the container; the time of a URL is 0.

        Raises:
            OSError: The container cannot be examined.
        """
        if is_url(self.container):
            return self.container_bytes, 0
        status = os.stat(self.container)
        return status.st_size, status.st_mtime_ns

    def __str__(self) -> str:
        return f"{self.container}: {self.name}"


def decoded(source: Path | StoredFile, decode: Callable[[Path | bytes], Result]) -> Result:
    """Apply a decoder to a file, or to the bytes of a stored file.

    Raises:
        UserError: The file cannot be read or decoded; the message names it.
    """
    if isinstance(source, Path):
        return decode(source)
    data = source.read()
    try:
        return decode(data)
    except UserError as error:  # names bytes "picture" or "audio"
        reason = str(error).removeprefix("picture: ").removeprefix("audio: ")
        raise UserError(f"{source}: {reason}") from None
