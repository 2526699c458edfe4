"""Finding the files that a corpus names, with one listing a folder, and saying why one is not found."""

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple


class _Listing(NamedTuple):
    """What a folder holds.

    Attributes:
        files: Names of regular files.
        others: Names of folders, links and what else there is.
    """

    files: set[str]
    others: set[str]


class FileFinder:
    """Looks files up in listings of their folders, each made once.

    Where a folder is on a network, one listing is far quicker than a question a file. Only what a listing does not
    call a regular file is asked about by itself.
    """

    def __init__(self) -> None:
        self._listings: dict[str, _Listing | None] = {}
        self._real: dict[str, str] = {}
        self._forms: dict[tuple[str, bool], dict[str, str]] = {}
        self._near: dict[tuple[str, bool], str | None] = {}

    def find(self, path: Path) -> Path | None:
        """The file that a path names: itself, or the one whose name is the same in another Unicode form.

        An archive or a disk of another system may have decomposed the letters with accents; to people and to
        Unicode the names are equal.

        Returns:
            None if there is no such file.
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
        # A folder that may be entered but not listed, and a file system that does not tell capitals apart.
        near = near or self._nearest(folder, name, fold=True)
        return path if (near is not None or self._unlisted(folder)) and os.path.isfile(path) else None

    def why_missing(self, path: Path) -> tuple[str, str]:
        """Say of a path that was not found what is wrong with it.

        Returns:
            What it is, to follow its name; and how to mend that.
        """
        if os.path.isdir(path):
            return "is a folder", "name a file in it"
        if os.path.islink(path):
            target = os.readlink(path)
            return f"is a broken link to {target}", "fetch what it stands for, e.g. by git annex get or dvc pull"
        text = str(path)
        if "\\" in text:
            return "is missing", rf"\ is no separator here{self._suggestion(Path(text.replace(chr(92), '/')), path)}"
        folder, name = os.path.split(path)
        if suggestion := self._suggestion(path, path):
            return "is missing", suggestion.removeprefix(", ")
        while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
            folder, name = os.path.split(folder)
        if folder and os.path.join(folder, name) != text:
            return "is missing", f"there is no folder {os.path.join(folder, name)}"
        return "is missing", "complete the corpus"

    def identity(self, path: Path) -> str:
        """A text that is the same for all paths to one file: links are followed.

        Args:
            path: What `find` gave.
        """
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        listing = self._listing(folder)
        if listing is not None and name in listing.others:
            return os.path.realpath(path)
        real = self._real[folder]
        return str(path) if real == folder else os.path.join(real, name)

    def _suggestion(self, path: Path, wrong: Path) -> str:
        """The name of a file that differs in capitals only; empty if there is none."""
        found = self.find(path) or self._nearest(*os.path.split(path), fold=True)
        if found is None or not os.path.isfile(found):
            return ""
        here = os.path.dirname(wrong)
        near = os.path.relpath(found, here) if os.path.isdir(here) else str(found)
        return f", did you mean {near}?"

    def _listing(self, folder: str) -> _Listing | None:
        """Names in a folder; None if it cannot be listed."""
        if folder not in self._listings:
            try:
                files: set[str] = set()
                others: set[str] = set()
                with os.scandir(folder or ".") as entries:
                    for entry in entries:
                        # As the listing has it: common file systems need no question a file for this.
                        (files if entry.is_file(follow_symlinks=False) else others).add(entry.name)
                self._listings[folder] = _Listing(files, others)
            except (OSError, ValueError):  # the latter for a name that no file can have
                self._listings[folder] = None
        return self._listings[folder]

    def _unlisted(self, folder: str) -> bool:
        return self._listing(folder) is None and os.access(folder or ".", os.X_OK)

    def _nearest(self, folder: str, name: str, fold: bool) -> str | None:
        """The path of the only entry whose name is equal in another Unicode form, or but for capitals too."""
        real = self._nearest_folder(folder, fold)
        if real is None or (listing := self._listing(real)) is None:
            return None
        if name in listing.files or name in listing.others:
            return os.path.join(real, name)
        if (real, fold) not in self._forms:
            forms: dict[str, str] = {}
            for one in (*listing.files, *listing.others):
                form = _form(one, fold)
                forms[form] = "" if form in forms else one  # of two that are equal so, neither is meant for certain
            self._forms[real, fold] = forms
        found = self._forms[real, fold].get(_form(name, fold))
        return os.path.join(real, found) if found else None

    def _nearest_folder(self, folder: str, fold: bool) -> str | None:
        """A folder that is there: the given one, or the one whose name is equal in another form."""
        if (folder, fold) not in self._near:
            parent, name = os.path.split(folder)
            if self._listing(folder) is not None:
                found: str | None = folder
            else:
                found = self._nearest(parent, name, fold) if name else None
            self._near[folder, fold] = found
        return self._near[folder, fold]


def _form(name: str, fold: bool) -> str:
    name = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", name.casefold()) if fold else name
