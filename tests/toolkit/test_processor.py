import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from shards.errors import UserError
from tests.tiny import tiny_model
from toolkit.model.build import build_model
from toolkit.model.processor import SpeechImageProcessor

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


def test_speech_is_cut_padded_and_resampled(tmp_path):
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


def test_its_output_is_the_models_input():
    model = build_model(tiny_model()).eval()
    inputs = PROCESSOR(images=[make_picture()] * 2, speech=[make_wave(0.5), make_wave(0.7)])
    speech, image = model(**inputs)
    assert speech.vector.shape == image.vector.shape == (2, 16)


def test_squashed_pictures_show_their_whole_width():
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
def test_a_folder_without_a_processor_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: ") as raised:
        SpeechImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wave", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32), np.zeros(100, np.int16)])
def test_what_is_not_a_waveform_is_refused(wave):
    with pytest.raises(UserError, match="expected a float array"):
        PROCESSOR(speech=[wave])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav"):
        PROCESSOR(speech=[tmp_path / "gone.wav"])
    with pytest.raises(UserError, match=r"gone\.png"):
        PROCESSOR(images=[tmp_path / "gone.png"])
