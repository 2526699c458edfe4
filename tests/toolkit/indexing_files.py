"""Small images, audio files and models for the tests of embed.py, index.py and search.py."""

import os
import shutil
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

EXPORT = Path(__file__).resolve().parents[1] / "compatibility/0.1/run/export/best"


def save_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((50, 40), Image.Resampling.NEAREST).save(path)
    return path


def save_audio(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    times = np.arange(int(chance.uniform(0.3, 1.2) * 16000)) / 16000
    wave = 0.4 * np.sin(2 * np.pi * chance.uniform(100, 3000) * times) + 0.05 * chance.standard_normal(len(times))
    soundfile.write(path, wave, 16000, subtype="PCM_16")
    return path


def save_images(folder: Path, count: int = 7) -> Path:
    for number in range(count):
        save_image(folder / ("sub" if number % 2 else ".") / f"{number}.png", number)
    return folder


def other_model(folder: Path) -> Path:
    """The export with another preprocessing: its embeddings cannot be compared."""
    shutil.copytree(EXPORT, folder)
    config = folder / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"crop"', '"squash"'))
    return folder


def hostile_files(folder: Path) -> None:
    """Files that cannot be indexed, each for its own reason, and loops of links."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    header = bytes.fromhex("89504e470d0a1a0a0000000d49484452000f4240000f424008020000005a7c0e2a")  # a million squared
    (folder / "huge.png").write_bytes(header)
    (folder / "two\nlines.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"GIF89a")
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "loop").symlink_to(".")
    (folder / "a").mkdir()
    (folder / "a" / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")


HOSTILE = ("empty.jpg", "text.jpg", "huge.png", "two\\nlines.jpg", "\\udcff.jpg", "broken.jpg", "itself.jpg")
