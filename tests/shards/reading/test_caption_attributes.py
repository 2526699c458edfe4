"""Text, speaker, language and duration of the captions of a split, unknown and damaged ones included."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.manifest import Manifest, load
from shards.reading.caption_attributes import CaptionAttributes, read_caption_attributes
from shards.writing.writer import Format, write_shards
from tests.shards.media.noise import drawn, spoken
from tests.shards.tars.stock_tars import members


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two splits of pictures with one to three captions, in several shards."""
    items = []
    for n in range(11):
        captions = [
            Caption(
                f"{n}-{k}",
                partial(spoken, 5 * n + k),
                f"text {n} {k}" if k else None,
                f"voice {n % 3}" * (n > 4),
                language=("en", "de", None)[(n + k) % 3],
            )
            for k in range(1 + n % 3)
        ]
        items.append(Item(f"p{n}", "test" if n > 2 else "dev", partial(drawn, n), tuple(captions)))
    folder = tmp_path_factory.mktemp("attributes")
    write_shards(items, folder, "noise", Format(samples_per_shard=3), {})
    return load(folder)


def naive(folder: Path, split: str) -> list[dict]:
    """The captions of a split, by another library and without the index."""
    captions: list[dict] = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        for name, data in members(path).items():
            if name.endswith(".json"):
                captions += json.loads(data)["captions"]
    return captions


def assert_same(attributes: CaptionAttributes, captions: list[dict]) -> None:
    for name in ("text", "speaker", "language"):
        assert getattr(attributes, name) == [caption.get(name) or None for caption in captions], name
    np.testing.assert_allclose(attributes.duration, [caption["duration"] for caption in captions], rtol=1e-6)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_all_captions_of_a_split_in_order(manifest: Manifest, split: str) -> None:
    captions = naive(manifest.folder, split)
    assert len(captions) == {"dev": 6, "test": 15}[split]
    assert {caption.get("language") for caption in captions} == {"en", "de", None}
    assert_same(read_caption_attributes(manifest, split), captions)


def test_remote_shards(manifest: Manifest) -> None:
    remote = load(f"file://{manifest.folder}")
    assert_same(read_caption_attributes(remote, "test"), naive(manifest.folder, "test"))


def test_an_unknown_split_is_named(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"no split 'val'.*dev, test"):
        read_caption_attributes(manifest, "val")


@pytest.mark.parametrize(
    "damage", [b"[", b"\xff\xfe", b"[" * 100, b'{"captions": 3}', b'{"captions": []}', b"[1]", b"null"]
)
def test_damaged_json_is_unknown_and_reported(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    shutil.copytree(manifest.folder, tmp_path, dirs_exist_ok=True)
    copy, captions = load(tmp_path), naive(manifest.folder, "test")
    sample = int(copy.rows("test")[1])
    with (tmp_path / copy.shards[copy.shard[sample]].name).open("r+b") as file:
        file.seek(int(copy.meta_offset[sample]))
        file.write(damage.ljust(int(copy.meta_bytes[sample])))
    first = len(copy.captions(sample - 1))
    for row in range(first, first + len(copy.captions(sample))):
        captions[row] = {"duration": captions[row]["duration"]}
    with caplog.at_level(logging.WARNING):
        assert_same(read_caption_attributes(copy, "test"), captions)
    assert "the JSON of 1 samples of split test is damaged" in caplog.text


def test_accents_are_those_of_the_voices_of_the_scenes(tmp_path: Path) -> None:
    spoken_by = {"en-gb-scotland+m3": "en-gb-scotland", "en-us": "en-us", "pt-br+Mr serious": "pt-br", "en+f1": "en"}
    spoken_by |= dict.fromkeys(("piper:joe", "en-gb+f1", "+f1", "Anna"))
    captions = tuple(Caption(f"{n}", partial(spoken, n), speaker=voice) for n, voice in enumerate([*spoken_by, None]))
    items = [Item("picture", "test", partial(drawn, 0), captions)]
    for corpus, expected in (("scenes", [*spoken_by.values(), None]), ("other", [None] * len(captions))):
        write_shards(items, tmp_path / corpus, corpus, Format(), {})
        assert read_caption_attributes(load(tmp_path / corpus), "test").accent == expected


def test_values_of_another_type_are_unknown(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"captions": [{"text": 3, "speaker": ["x"], "language": {}}, "caption", None]}
    monkeypatch.setattr("shards.reading.reader.Reader.meta", lambda self, sample: odd)
    attributes = read_caption_attributes(manifest, "test")
    for name in ("text", "speaker", "language"):
        assert set(getattr(attributes, name)) == {None}
