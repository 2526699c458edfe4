"""The page of check_shards: self-contained, safe for any contents of the shards, written even for damaged ones."""

import base64
import io
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from shards.checking import page as module
from shards.checking.check import check_folder
from shards.checking.page import write_page
from shards.errors import UserError
from shards.media.audio import Codec
from tests.html_page import Page
from tests.shards.checking import damage

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def page_of(folder: Path, advice: tuple[str, ...] = ()) -> Page:
    write_page(folder.parent / "page.html", check_folder(folder, 0), advice)
    return Page(folder.parent / "page.html")


def payload(source: str, mime: str) -> io.BytesIO:
    head, _, data = source.partition(",")
    assert head == f"data:{mime};base64"
    return io.BytesIO(base64.b64decode(data))


@pytest.mark.parametrize(
    ("codec", "mime", "kind"), [("flac", "flac", "FLAC"), ("wav", "wav", "WAV"), ("opus", "ogg", "OGG")]
)
def test_samples_with_pictures_and_recordings(tmp_path: Path, codec: Codec, mime: str, kind: str) -> None:
    page = page_of(damage.write(tmp_path / "shards", codec=codec), ("take more shards",))
    pictures, recordings = page.sources("img"), page.sources("audio")
    assert (len(pictures), len(recordings)) == (11, 22)
    assert {Image.open(payload(source, "image/jpeg")).format for source in pictures} == {"JPEG"}
    assert {soundfile.info(payload(source, f"audio/{mime}")).format for source in recordings} == {kind}
    for word in ("healthy", "t3", "e1", "it is 1", "train-000002.tar", "take more shards", "11 of 11 samples"):
        assert word in page.words
    waveforms = [
        attributes for tag, attributes in page.tags if tag == "svg" and str(attributes["aria-label"])[-2:] == " s"
    ]
    assert len(waveforms) == 22


def test_nothing_is_loaded_or_run(tmp_path: Path) -> None:
    items = [replace(one, image_id=f"{one.image_id}{EVIL}", twin=None) for one in damage.corpus()]
    items.append(damage.item(EVIL, "test", seed=3, text=f"{{}} {EVIL}"))
    folder = damage.write(tmp_path / "shards", items)
    (folder / "x<script>.tar").touch()
    page = page_of(folder, (EVIL,))
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td"),
        *("ul", "li", "div", "small", "img", "svg", "rect", "text", "line", "audio", "figure"),
    } - {"title"} | {"title"}
    assert page.words.count(EVIL) >= 11 + 2 + 1
    assert not [one for _, attributes in page.tags for one in attributes if one.startswith("on")]
    assert all(str(a[name]).startswith("data:") for _, a in page.tags for name in ("src", "href") if name in a)
    policy = next(str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def test_damaged_members_are_shown_as_such(folder: Path) -> None:
    damage.replace(folder, "t0", 1, damage.bomb(damage.member(folder, "t0", 1)))
    damage.replace(folder, "t1", 1, damage.member(folder, "t1", 1)[:700])
    damage.replace(folder, "t2", 2, damage.recording(3700))
    damage.replace(folder, "t3", 3, b"hello")
    damage.replace(folder, "t4", 0, b"[" * 500_000)
    sound = damage.member(folder, "t5", 2)
    damage.replace(folder, "t5", 2, sound[: len(sound) // 2])
    (folder / "dev-000000.tar").unlink()
    (folder / "test-000000.tar").unlink()
    os.mkfifo(folder / "test-000000.tar")
    page = page_of(folder)
    assert (len(page.sources("img")), len(page.sources("audio"))) == (5, 12)
    for word in ("NOT HEALTHY", "a decompression bomb", "3,700 s of audio", "(no text)", "No such file"):
        assert word in page.words
    assert page.words.count("cannot be decoded as audio") == 2  # in the summary and beside the recording


def test_json_with_fewer_captions_than_the_index(folder: Path) -> None:
    stored = json.loads(damage.member(folder, "t4", 0))
    del stored["captions"][1]
    damage.replace(folder, "t4", 0, json.dumps(stored).encode())
    page = page_of(folder)
    assert len(page.sources("audio")) == 22
    assert page.words.count("(no text)") == 1


def test_many_samples_and_captions_are_left_out(tmp_path: Path) -> None:
    chatty = damage.item("t0", "train", 0)
    captions = tuple(damage.Caption(f"c{n}", partial(damage.spoken, n), f"text {n}") for n in range(7))
    items = [damage.item(f"t{n}", "train", n) for n in range(1, 60)]
    items += [damage.item(f"d{n}", "dev", 70 + n) for n in range(1)]
    page = page_of(damage.write(tmp_path / "shards", [replace(chatty, captions=captions), *items]))
    assert 20 <= len(page.sources("img")) <= 26
    assert "of 61 samples" in page.words
    assert "and 2 more captions" in page.words
    assert "dev-000000.tar" in page.words


def test_captions_with_and_without_text_speaker_and_language(tmp_path: Path) -> None:
    mute = damage.item("t0", "train", 0)
    items = [replace(mute, captions=tuple(replace(one, text=None) for one in mute.captions))]
    page = page_of(damage.write(tmp_path / "shards", items))
    assert page.words.count("(no text)") == 2
    assert "None" not in page.words
    item = damage.item("t0", "train", 0)
    first, second = item.captions
    items = [replace(item, captions=(replace(first, language="pt-br", speaker="ana"), replace(second, speaker="bea")))]
    page = page_of(damage.write(tmp_path / "more", items))
    assert "ana, pt-br, " in page.words
    assert "bea, " in page.words
    assert "None" not in page.words


def test_large_members_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = damage.write(tmp_path / "shards", [damage.item("t0", "train", 0)])
    picture, first = (len(damage.member(folder, "t0", part)) for part in (1, 2))
    monkeypatch.setattr(module, "_MAX_BYTES", first - 1)
    second = len(damage.member(folder, "t0", 3))
    page = page_of(folder)
    assert page.words.count("too large to show") == sum(size >= first for size in (picture, first, second))
    assert f"{picture:,} bytes" in page.words
    assert module._MAX_BYTES < 2 << 20


def test_histograms_count_everything(folder: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", check_folder(folder, 0))
    bars = [line.split("</title>")[0].split(": ") for line in (tmp_path / "page.html").read_text().split("<title>")[2:]]
    assert sum(int(count) for _, count in bars) == 22 + 11 + 11 + 22
    assert ["1.5 to 2.5", "11"] in bars


def test_a_page_that_cannot_be_written_and_text_that_is_not_utf_8(folder: Path, tmp_path: Path) -> None:
    result = check_folder(folder, 0)
    with pytest.raises(UserError, match=r"cannot write .*nowhere/page\.html: No such file"):
        write_page(tmp_path / "nowhere/page.html", result)
    stored = json.loads(damage.member(folder, "t4", 0))
    stored["captions"][1]["text"] = "half \ud800 a letter"
    damage.replace(folder, "t4", 0, json.dumps(stored).encode())
    write_page(tmp_path / "page.html", check_folder(folder, 0))
    assert "half \\ud800 a letter" in Page(tmp_path / "page.html").words
