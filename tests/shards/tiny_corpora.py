"""Tiny corpora in the layouts of the real ones, for tests."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import soundfile
from PIL import Image


def speech(path: Path, seconds: float = 0.25, rate: int = 16000, channels: int = 1, **how) -> Path:
    """Write noise, another for every file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(crc32(path.name.encode()))
    samples = chance.uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)
    soundfile.write(path, samples, rate, **how)
    return path


def photo(path: Path, size: tuple[int, int] = (40, 30), colour: str | None = None) -> Path:
    """Write a picture of one colour, by default one that depends on its name and folder."""
    red, green, blue, _ = crc32("/".join(path.parts[-2:]).encode()).to_bytes(4, "big")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour or (red, green, blue)).save(path)
    return path


def flickr8k(root: Path, pictures: dict[str, int] | None = None, captions: int = 2) -> Path:
    """The Flickr8k Audio Caption Corpus with so many pictures a split."""
    audio, texts = root / "flickr_audio", root / "Flickr8k_text"
    texts.mkdir(parents=True)
    names, speakers, tokens, number = [], [], [], 0
    for split, count in (pictures or {"train": 3, "dev": 1, "test": 1}).items():
        stems = [f"{1000 + number + n}_ab{n}" for n in range(count)]
        number += count
        (texts / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{stem}.jpg\n" for stem in stems))
        for stem in stems:
            photo(root / "Flicker8k_Dataset" / f"{stem}.jpg")
            for k in range(captions):
                speech(audio / "wavs" / f"{stem}_{k}.wav")
                names.append(f"{stem}_{k}.wav {stem}.jpg #{k}")
                speakers.append(f"{stem}_{k}.wav {k + 7}")
                tokens.append(f"{stem}.jpg#{k}\tcaption {k} of {stem} .")
    # The order of the real file is not that of the captions' numbers.
    (audio / "wav2capt.txt").write_text("\n".join(reversed(names)) + "\n")
    (audio / "wav2spk.txt").write_text("\n".join(speakers) + "\n")
    (texts / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    return root


def spokencoco(root: Path, train: int = 3, val: int = 3, captions: int = 2) -> Path:
    for part, count in (("train", train), ("val", val)):
        data = []
        for n in range(count):
            image = f"{part}2014/COCO_{part}2014_{100 * len(part) + n:012d}.jpg"
            photo(root / image)
            spoken = []
            for k in range(captions):
                uttid = f"m{k}-{part}_{n}_{k}"
                wav = f"wavs/{part}/{n}/{uttid}.wav"
                speech(root / wav)
                spoken.append({"text": f"TEXT {k}", "speaker": f"m{k}", "uttid": uttid, "wav": wav})
            data.append({"image": image, "captions": spoken})
        (root / f"SpokenCOCO_{part}.json").write_text(json.dumps({"data": data}))
    return root


def places(root: Path) -> Path:
    rows = {
        "train_2020": ["a/abbey/1.jpg", "a/abbey/2.jpg", "a/abbey/1.jpg"],
        "dev_seen_2020": ["b/bar/1.jpg"],
        "dev_unseen_2020": ["b/bar/1.jpg"],
    }
    for name, images in rows.items():
        data = []
        for n, image in enumerate(images):
            photo(root / "images" / image)
            uttid = f"{name}-{n}"
            speech(root / f"wavs/{n}/{uttid}.wav")
            data.append(
                {
                    "uttid": uttid,
                    "speaker": f"s{n}",
                    "asr_text": "a place",
                    "wav": f"wavs/{n}/{uttid}.wav",
                    "image": image,
                }
            )
        head = {"image_base_path": "/nowhere/images", "audio_base_path": "/nowhere/audio", "data": data}
        (root / f"{name}.json").write_text(json.dumps(head))
    return root


def table(root: Path, rows: list[dict[str, str]]) -> Path:
    """A CSV table; the files it names are made unless they exist."""
    columns = ["image", "audio", "text", "speaker", "split"]
    lines = [",".join(columns)]
    for row in rows:
        if not (root / row["image"]).exists():
            photo(root / row["image"])
        if not (root / row["audio"]).exists():
            speech(root / row["audio"])
        lines.append(",".join(row.get(column, "") for column in columns))
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return root


def one_row_table(root: Path) -> Path:
    return table(root, [{"image": "1.png", "audio": "1.wav", "text": "hello"}])
