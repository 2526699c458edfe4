import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.manifest import load
from shards.media.picture import decode_picture, read_picture
from shards.reading.reader import Reader
from shards.writing.writer import Format, write_shards
from tests.tiny import tiny_model
from toolkit.config.schema import Config, Data, Evaluation
from toolkit.model.build import build_model
from toolkit.model.processor import SpeechImageProcessor
from toolkit.training.checkpointing.export import Exports

PROCESSOR = SpeechImageProcessor(image_size=32, max_seconds=1.0)


def make_picture(width=60, height=40) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5, columns * 4, rows + columns], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def make_wave(seconds: float, rate=16000) -> np.ndarray:
    return (0.5 * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 440 / rate))).astype(np.float32)


def test_pictures_are_squares_of_bytes(tmp_path):
    make_picture().save(tmp_path / "picture.png")
    images = PROCESSOR(images=[make_picture(), tmp_path / "picture.png", str(tmp_path / "picture.png")])["images"]
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[1], images[2])
    square = make_picture().crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())
    assert (images[0].float() - expected.float()).abs().mean() < 4, "should be the picture's central square"


def test_speech_is_truncated_padded_and_resampled(tmp_path):
    soundfile.write(tmp_path / "speech.wav", make_wave(0.5, 8000), 8000)
    inputs = PROCESSOR(speech=[make_wave(2.0), tmp_path / "speech.wav", make_wave(0.25).astype(np.float64)])
    assert inputs.keys() == {"waveforms", "lengths"}
    assert inputs["waveforms"].dtype == torch.float32
    assert inputs["lengths"].tolist() == [16000, 8000, 4000]
    assert inputs["waveforms"].shape == (3, 16000)
    assert not inputs["waveforms"][1, 8000:].any()
    assert torch.equal(inputs["waveforms"][0], torch.from_numpy(make_wave(1.0)))
    middle = slice(1000, 7000)
    assert (inputs["waveforms"][1, middle] - torch.from_numpy(make_wave(0.5))[middle]).abs().max() < 0.01


def test_the_output_is_the_models_input():
    model = build_model(tiny_model()).eval()
    inputs = PROCESSOR(images=[make_picture()] * 2, speech=[make_wave(0.5), make_wave(0.7)])
    speech, image = model(**inputs)
    assert speech.embedding.shape == image.embedding.shape == (2, 16)


def test_squashed_pictures_keep_their_complete_width():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :30] = 255
    crop, squash = (
        SpeechImageProcessor(32, 1.0, resize=how)(images=[Image.fromarray(wide)])["images"]
        for how in ("crop", "squash")
    )
    assert crop.max() < 50
    assert squash[..., :6].min() > 200


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_round_trip(tmp_path, resize):
    processor = SpeechImageProcessor(image_size=224, max_seconds=8.0, resize=resize)
    processor.save_pretrained(tmp_path / "model")
    assert SpeechImageProcessor.from_pretrained(tmp_path / "model") == processor


@pytest.mark.parametrize(
    "content",
    [None, "{", '{"image_mean": [0.5]}', "[]", '{"image_size": 8, "max_seconds": 1, "resize": "pad"}'],
)
def test_a_folder_without_a_processor_is_an_error_of_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: ") as raised:
        SpeechImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wave", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32), np.zeros(100, np.int16)])
def test_invalid_waveforms_are_refused(wave):
    with pytest.raises(UserError, match="expected a float array"):
        PROCESSOR(speech=[wave])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav"):
        PROCESSOR(speech=[tmp_path / "gone.wav"])
    with pytest.raises(UserError, match=r"gone\.png"):
        PROCESSOR(images=[tmp_path / "gone.png"])


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(("short_side", "quality"), [(256, 90), (48, 30), (500, 100)])
def test_an_exported_processor_prepares_pictures_like_the_shards(tmp_path, short_side, quality, resize):
    """Identical pixels: reduced to the same side and encoded as JPEG with the same quality."""
    grain = np.random.default_rng(1).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    picture = Image.blend(make_picture(400, 300), Image.fromarray(grain), 0.3)
    picture.save(tmp_path / "picture.png")
    arguments = {"short_side": short_side, "quality": quality}
    form = Format(short_side=short_side, quality=quality)
    words = Caption("picture/0", lambda: (make_wave(0.5)[None], 16000), "a caption")
    write_shards(
        [Item("picture", "train", tmp_path / "picture.png", (words,))], tmp_path / "out", "toy", form, arguments
    )
    manifest = load(tmp_path / "out")
    settings = Config(data=Data(image_size=32, resize=resize), evaluation=Evaluation(max_seconds=20.0))
    Exports(tmp_path, settings, manifest.arguments).processor.save_pretrained(tmp_path / "model")

    processor = SpeechImageProcessor.from_pretrained(tmp_path / "model")
    shown = processor(images=[tmp_path / "picture.png"])["images"][0].numpy()
    assert np.array_equal(shown, decode_picture(Reader(manifest).picture(0), 32, resize=resize))
    assert processor.max_seconds == 20.0, "evaluation's limit, not training's"


def test_shards_without_the_values_have_the_defaults(tmp_path):
    processor = Exports(tmp_path, Config(), {}).processor
    assert (processor.short_side, processor.quality) == (Format().short_side, Format().quality)


def test_a_processor_of_an_earlier_version_gives_the_same_pictures(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_size": 32, "max_seconds": 8.0, "sampling_rate": 16000}')
    processor = SpeechImageProcessor.from_pretrained(tmp_path)
    picture = make_picture(400, 300)
    assert np.array_equal(processor(images=[picture])["images"][0], decode_picture(read_picture(picture, 64, 95), 32))


@pytest.mark.parametrize("values", [{"quality": 0}, {"quality": "90"}, {"short_side": 0}, {"short_side": "256"}])
def test_invalid_values_are_an_error_of_one_line(tmp_path, values):
    SpeechImageProcessor(32, 8.0).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not a processor of this toolkit") as raised:
        SpeechImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
