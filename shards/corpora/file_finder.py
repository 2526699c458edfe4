"""Locates the files that a corpus names, listing each folder once, and explains why a file is missing."""

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple


class _Listing(NamedTuple):
    """Entries of a folder."""

    files: set[str]  # names of regular files
    others: set[str]  # names of folders, links and other entries


class FileFinder:
    """Looks files up in cached listings of their folders.

    On a network file system one listing is far faster than one `stat` per file. Only entries that are not regular files
    need a `stat`.
    """

    def __init__(self) -> None:
        self._listings: dict[str, _Listing | None] = {}
        self._real: dict[str, str] = {}
        self._forms: dict[tuple[str, bool], dict[str, str]] = {}
        self._near: dict[tuple[str, bool], str | None] = {}

    def find(self, path: Path) -> Path | None:
        """Find the file that a path names: the path itself, or the equal name in another Unicode form.

        Archives and disks of other systems may have decomposed accented letters; Unicode calls such names equivalent.

        Returns:
            The path on disk, or None if there is no such file.
        """
        folder, name = os.path.split(path)
        listing = self._listing(folder)
        if listing is not None and name in listing.files:
            return path
        if listing is not None and name in listing.others:
            return path if os.path.isfile(path) else None
        near = self._nearest(folder, name, fold=False)
        if near is not None and os.path.isfile(near):
            return Path(near)
        # A folder that cannot be listed but entered, or a file system that ignores case.
        near = near or self._nearest(folder, name, fold=True)
        unlisted = listing is None and os.access(folder or ".", os.X_OK)
        return path if (near is not None or unlisted) and os.path.isfile(path) else None

    def why_missing(self, path: Path) -> tuple[str, str]:
        """Explain why `find` does not find a path.

        Returns:
            The reason, to follow the path in a message, and how to fix it.
        """
        if os.path.isdir(path):
            return "is a folder", "name a file in it"
        if os.path.islink(path):
            target = os.readlink(path)
            return f"is a broken link to {target}", "fetch its target, e.g. by git annex get or dvc pull"
        text = str(path)
        if "\\" in text:
            return (
                "is missing",
                rf"\ is not a separator here{self._suggestion(Path(text.replace(chr(92), '/')), path)}",
            )
        folder, name = os.path.split(path)
        if suggestion := self._suggestion(path, path):
            return "is missing", suggestion.removeprefix(", ")
        while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
            folder, name = os.path.split(folder)
        if folder and os.path.join(folder, name) != text:
            return "is missing", f"there is no folder {os.path.join(folder, name)}"
        return "is missing", "complete the corpus"

    def identity(self, path: Path) -> str:
        """Return a string that is equal for all results of `find` that are one file, with links followed."""
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        listing = self._listing(folder)
        if listing is not None and name in listing.others:
            return os.path.realpath(path)
        real = self._real[folder]
        return str(path) if real == folder else os.path.join(real, name)

    def _suggestion(self, path: Path, wrong: Path) -> str:
        """Suggest a file whose name differs only in case; empty if there is none."""
        similar = self.find(path) or self._nearest(*os.path.split(path), fold=True)
        if similar is None or not os.path.isfile(similar):
            return ""
        here = os.path.dirname(wrong)
        near = os.path.relpath(similar, here) if os.path.isdir(here) else str(similar)
        return f", did you mean {near}?"

    def _listing(self, folder: str) -> _Listing | None:
        """Return the entries of a folder; None if it cannot be listed."""
        if folder not in self._listings:
            try:
                files: set[str] = set()
                others: set[str] = set()
                with os.scandir(folder or ".") as entries:
                    for entry in entries:
                        # The listing gives the type on common file systems, without a `stat` per file.
                        (files if entry.is_file(follow_symlinks=False) else others).add(entry.name)
                self._listings[folder] = _Listing(files, others)
            except (OSError, ValueError):  # ValueError: a name with a zero byte
                self._listings[folder] = None
        return self._listings[folder]

    def _nearest(self, folder: str, name: str, fold: bool) -> str | None:
        """Return the path of the only entry whose name is equal up to Unicode form and, with `fold`, up to case."""
        real = self._nearest_folder(folder, fold)
        if real is None or (listing := self._listing(real)) is None:
            return None
        if name in listing.files or name in listing.others:
            return os.path.join(real, name)
        if (real, fold) not in self._forms:
            forms: dict[str, str] = {}
            for one in (*listing.files, *listing.others):
                form = _form(one, fold)
                forms[form] = "" if form in forms else one  # ambiguous names match nothing
            self._forms[real, fold] = forms
        match = self._forms[real, fold].get(_form(name, fold))
        return os.path.join(real, match) if match else None

    def _nearest_folder(self, folder: str, fold: bool) -> str | None:
        """Return the folder if it exists, or else the one whose name is equal in another form."""
        if (folder, fold) not in self._near:
            parent, name = os.path.split(folder)
            if self._listing(folder) is not None:
                near: str | None = folder
            else:
                near = self._nearest(parent, name, fold) if name else None
            self._near[folder, fold] = near
        return self._near[folder, fold]


def _form(name: str, fold: bool) -> str:
    name = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", name.casefold()) if fold else name
