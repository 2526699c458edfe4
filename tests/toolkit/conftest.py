"""Shards of noise to train on, toy shards, and a run folder as training leaves it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.writing.writer import Format, write_shards

RATE = 16000


def drawn(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)


def spoken(seed: int) -> tuple[np.ndarray, int]:
    chance = np.random.default_rng(seed)
    return chance.uniform(-0.5, 0.5, (1, chance.integers(RATE // 4, RATE))).astype(np.float32), RATE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 pictures to train on and 6 of dev, with two captions each, all of noise."""
    items = [
        Item(
            f"{split}{n}",
            split,
            partial(drawn, n),
            tuple(Caption(f"{split}{n}-{k}", partial(spoken, 9 * n + k)) for k in range(2)),
        )
        for split, count in (("train", 40), ("dev", 6))
        for n in range(count)
    ]
    folder = tmp_path_factory.mktemp("shards") / "noise"
    write_shards(items, folder, "noise", Format(samples_per_shard=7), {})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 3 train and 13 test pictures of 1 to 3 captions, and twins of test pictures 2, 3, 4 and 5."""
    from tests.toolkit.evaluation.test_retrieve import item

    items = [item(number, f"train{number}", "train") for number in range(3)]
    items += [item(number, f"test{number}", "test") for number in range(13)]
    for number in range(2, 6):
        kind = ("colour", "relation")[number % 2]
        items.append(item(40 + number, f"test{number}-{kind}", "twins", twin=f"test{number}"))
    out = tmp_path_factory.mktemp("shards") / "toy"
    write_shards(items, out, "toy", Format(samples_per_shard=5), {})
    return out


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """A run folder, on which commands work in this process."""
    from tests.toolkit.evaluation.test_retrieve import CPU, random_model, settings
    from toolkit.model.processor import SpeechImageProcessor
    from toolkit.run_folder import to_yaml

    monkeypatch.setattr("toolkit.distributed.init_distributed", lambda: (0, 1, CPU))
    configured = settings(folder)
    configured.data.augment.speech.noise = 0.25
    (tmp_path / "config.yaml").write_text(to_yaml(configured))
    export = tmp_path / "export" / "best"
    random_model().save_pretrained(export)
    SpeechImageProcessor(32, 1.0).save_pretrained(export)
    (export / "progress.json").write_text(json.dumps({"step": 1234}))
    return tmp_path
