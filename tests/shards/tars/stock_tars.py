"""Tars that stock `webdataset` writes, in three layouts of their members."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import soundfile
from PIL import Image
from webdataset import ShardWriter, TarWriter

from tests.shards.media.picture_files import saved


def picture(name: str, kind: str = "JPEG", size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture of one color, which its name gives."""
    return saved(kind, Image.new("RGB", size, tuple(crc32(name.encode()).to_bytes(4, "big")[:3])))


@cache  # the serial numbers of Ogg streams are random
def speech(name: str, kind: str = "WAV", rate: int = 16000, seconds: float = 0.25) -> bytes:
    """Noise, which its name gives."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(crc32(name.encode())).uniform(-0.5, 0.5, round(seconds * rate))
    soundfile.write(buffer, noise.astype(np.float32), rate, format=kind)
    return buffer.getvalue()


def one_caption_each(folder: Path, samples: int = 6, rate: int = 16000) -> Path:
    """KEY.jpg, KEY.wav, KEY.txt; three samples a tar, and keys that begin with what `TarWriter` gives no time to."""
    folder.mkdir(parents=True)
    with ShardWriter(str(folder / "train-%06d.tar"), maxcount=3, verbose=0, mtime=0.5) as writer:
        for n in range(samples):
            sample = {"jpg": picture(f"p{n}"), "wav": speech(f"s{n}", rate=rate), "txt": f"text {n}"}
            writer.write({"__key__": f"k{n}", **sample})
    return folder


def joined_by_image_id(folder: Path, pictures: int = 3, captions: int = 2) -> Path:
    """A sample for each caption: KEY.png, KEY.flac, KEY.json with image_id, split, text, speaker; keys in folders."""
    folder.mkdir(parents=True)
    with ShardWriter(str(folder / "part-%03d.tar"), maxcount=4, verbose=0) as writer:
        for k in range(captions):
            for n in range(pictures):
                split = "test" if n == pictures - 1 else "train"
                meta = {"image_id": n, "split": split, "text": f"text {n} {k}", "speaker": f"s{k}", "language": "en"}
                sample = {"png": picture(f"p{n}", "PNG"), "flac": speech(f"s{n}.{k}", "FLAC", 22050), "json": meta}
                writer.write({"__key__": f"{split}/{n}_{k}", **sample})
    return folder


def several_captions(folder: Path, split: str, first: int = 0, samples: int = 3) -> Path:
    """KEY.photo.webp, KEY.0.speech.ogg, KEY.1.speech.ogg, KEY.transcript with a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(folder / f"{split}.tar"), encoder=False) as writer:
        for n in range(first, first + samples):
            audio = {f"{k}.speech.ogg": speech(f"s{n}.{k}", "OGG") for k in (0, 1)}
            text = f"text {n} 0\ntext {n} 1\n".encode()
            writer.write({"__key__": f"k{n}", "photo.webp": picture(f"p{n}", "WEBP"), "transcript": text, **audio})
    return folder


def members(path: Path) -> dict[str, bytes]:
    """The members of a tar."""
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar if info.isfile()}


def pack(path: Path, files: dict[str, bytes | str | dict], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar of some members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
