"""Listing a folder whose name comes from the user."""

from pathlib import Path

from shards.errors import UserError


def listed(folder: Path) -> list[Path]:
    """The paths in a folder.

    Raises:
        UserError: It is none, or may not be read.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None
