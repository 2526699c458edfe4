"""A small corpus of drawn pictures and tones, and the contents of its shards."""

import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.writing.folder_lock import Part
from shards.writing.writer import Format, plan_shards, write_part, write_shards
from tests.shards import tiny_corpora as tiny


def tone(hertz=300, rate=16000, seconds=0.2):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.stack([wave, 0 * wave]).astype(np.float32), rate


def drawn(image_id, split="train", captions=2, rate=16000, **how):
    """A picture and captions that need no file."""
    spoken = tuple(
        Caption(f"{image_id}-{k}", partial(tone, 300 + 50 * k, rate), f"«text» {k}", f"speaker {k}")
        for k in range(captions)
    )
    return Item(image_id, split, partial(Image.new, "RGB", (20, 20), "red"), spoken, **how)


def write(items, folder, **how):
    return write_shards(items, folder, "tiny", Format(**how), {"corpus": "tiny"})


ITEMS = [
    drawn("dev/1", "dev"),
    drawn("t-2", "train", captions=3),
    drawn("t-1", "train"),
    drawn("x", "extra", captions=1, rate=22050, twin="t-1"),
    drawn("t-3", "train", captions=1),
]


def no_voice():
    raise UserError("install the voices")


def shard_corpus(folder, bad=None):
    """Three shards of two pictures from files, and one of drawn ones; the recording of picture `bad` is empty."""
    items = []
    for n in range(6):
        photo = tiny.photo(folder / f"{n}.png", colour=("red", "blue", "green")[n % 3])
        speech = tiny.speech(folder / f"{n}.wav")
        if n == bad:
            speech.write_bytes(b"")
        items.append(Item(f"p{n}", "train", photo, (Caption(f"u{n}", speech, f"text {n}", "anna"),)))
    return [*items, drawn("d0", "dev", 1), drawn("d1", "dev", 1)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undisturbed(folder, items, **how):
    """The contents that a run gives which nothing stops."""
    write(items, folder / "undisturbed", **how)
    return contents(folder / "undisturbed")


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def other_content(path):
    """As long as before; the time of change is set, since that of the file system may not be fine enough."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


CHANGES = [(longer, "has another size"), (other_content, "has other content")]


def identities(folder):
    """What a shard keeps if no one writes it again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def stop(items, folder, **how):
    """Begin to write, and end with shards kept because of a bad recording."""
    with pytest.raises(
        UserError, match=r"empty file \(0 bytes\); \d of 4 shards are finished and kept: the same comm"
    ) as e:
        write(items, folder, samples_per_shard=2, **how)
    assert "\n" not in str(e.value)
    return identities(folder)


def killed_at(moment, after, work):
    """Work in a process that dies just before or after its n-th change of a name; whether it got as far."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    calls = []

    def dying(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) == moment and not after:
                os._exit(9)
            try:
                real(*arguments, **options)
            finally:
                if len(calls) == moment:
                    os._exit(9)

        return call

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def write_one_part(items, folder, number, of, **how):
    planned = plan_shards(items, "tiny", Format(samples_per_shard=1, **how), {"corpus": "tiny"}, of)
    return write_part(planned, folder, Part(number, of))
