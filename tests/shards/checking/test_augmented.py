"""The section of the page that shows the augmentation."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from shards.augment.settings import Augment, ImageAugment, SpeechAugment
from shards.checking.augmented import Preview
from shards.checking.check import check_folder
from shards.checking.page import write_page
from shards.errors import UserError
from shards.manifest import load
from tests.html_page import Page
from tests.shards.checking import damage

SETTINGS = Augment(SpeechAugment(gain=1.0, gain_db=[-6.0, -6.0], babble=0.5), ImageAugment(color=1.0))


def preview(settings: Augment = SETTINGS, split: str = "train") -> Preview:
    return Preview(settings, split, 16, "crop", 8.0, 0)


def page_of(folder: Path, shown: Preview) -> Page:
    write_page(folder.parent / "page.html", check_folder(folder, 0), further=shown.section)
    return Page(folder.parent / "page.html")


def decoded(source: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(source.partition(",")[2]))


def test_original_and_augmented_side_by_side(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder, preview())
    write_page(tmp_path / "plain.html", check_folder(folder, 0))
    plain = Page(tmp_path / "plain.html")
    # A sample with each of 3 kinds alone, then up to 6 with 3 variants, each beside the original.
    shown = 4 + 4 * min(6, len(load(folder).rows("train")))
    assert len(page.sources("img")) - len(plain.sources("img")) == shown
    assert len(page.sources("audio")) - len(plain.sources("audio")) == shown
    for words in ("unchanged", "gain -6 dB", "color ", "babble ", "each kind alone"):
        assert words in page.words
    pictures = [np.asarray(Image.open(decoded(one))) for one in page.sources("img")[:4]]
    waves = [soundfile.read(decoded(one), dtype="float32")[0] for one in page.sources("audio")[:4]]
    assert pictures[0].shape == (16, 16, 3)
    assert np.array_equal(pictures[0], pictures[1]), "gain is for audio alone"
    assert not np.array_equal(pictures[0], pictures[3])
    assert waves[2] == pytest.approx(10 ** (-6 / 20) * waves[0], abs=1e-4)
    assert np.array_equal(waves[0], waves[3])


def test_unreadable_samples_and_splits(folder: Path) -> None:
    damage.replace(folder, "t0", 1, damage.member(folder, "t0", 1)[:200])
    page = page_of(folder, preview(Augment(image=ImageAugment(crop=1.0))))
    assert "cannot be decoded" in page.words
    assert "unchanged" in page.words
    with pytest.raises(UserError, match="no split 'nowhere'"):
        page_of(folder, preview(split="nowhere"))
