"""Retrieved examples: fixed queries, marked correct candidates, small files, and no failure of training."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from shards.manifest import load
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture
from shards.reading.reader import Reader
from tests.shards.media.noise import spoil
from tests.toolkit.training import test_trainer
from toolkit.config import schema as config
from toolkit.evaluation import examples
from toolkit.evaluation.recall import RankCounts, Ranking
from toolkit.evaluation.retrieve import Retrieval
from toolkit.reporting.examples import FINAL


def retrieval(folder: Path, shift: int) -> Retrieval:
    """On dev: for each caption the pictures in order, starting `shift` after the correct one."""
    manifest = load(folder)
    samples = manifest.rows("dev")
    spans = [manifest.captions(int(sample)) for sample in samples]
    captions = np.concatenate([np.asarray(span) for span in spans])
    picture = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(span) for span in spans]))
    candidates = (picture[:, None] + shift + torch.arange(len(samples))) % len(samples)
    ahead = torch.full_like(picture, -shift % len(samples))
    none = torch.zeros(0, dtype=torch.int64)
    ranking = Ranking(RankCounts(ahead, torch.zeros_like(ahead), torch.ones_like(ahead)), candidates)
    report = {"split": "dev", "reranked": None}
    return Retrieval(report, samples, captions, picture, none, ranking, Ranking(RankCounts(none, none, none), none))


def pixels(uri: str) -> np.ndarray:
    head, _, code = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))).astype(float)


def test_correct_answers_are_marked_and_pictures_are_the_candidates(shards: Path) -> None:
    reader, retrieved = Reader(load(shards)), retrieval(shards, shift=4)
    queries = examples.draw_examples(reader, retrieved, seed=3)
    assert len(queries) == examples.QUERIES == 6
    for query in queries:
        assert query["rank"] == 3
        assert [answer["right"] for answer in query["answers"]] == [False, False, True, False, False]
        caption = next(
            at for at in range(len(retrieved.captions)) if examples.caption_text(reader, retrieved, at) == query["text"]
        )
        for answer, at in zip(query["answers"], retrieved.speech_to_image.candidates[caption].tolist(), strict=False):
            stored = decode_picture(reader.picture(int(retrieved.samples[at])), examples.SIDE).transpose(1, 2, 0)
            assert np.abs(pixels(answer["picture"]) - stored).mean() < 16


def test_captions_can_be_played(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, retrieved = Reader(load(shards)), retrieval(shards, shift=0)
    texts = [examples.caption_text(reader, retrieved, at) for at in range(len(retrieved.captions))]

    def seconds(query: dict[str, str]) -> float:
        head, _, code = query["audio"].partition(",")
        assert head == "data:audio/ogg;base64"
        return soundfile.info(io.BytesIO(base64.b64decode(code))).duration

    for query in examples.draw_examples(reader, retrieved, seed=3):
        row = int(retrieved.captions[texts.index(query["text"])])
        assert seconds(query) == pytest.approx(len(decode_audio(reader.audio(row))) / SAMPLE_RATE, abs=0.05)
    monkeypatch.setattr(examples, "_MAX_SECONDS", 0.25)
    assert all(seconds(query) <= 0.3 for query in examples.draw_examples(reader, retrieved, seed=3))


def test_the_examples_of_the_final_evaluation_have_their_own_file(shards: Path, tmp_path: Path) -> None:
    settings = test_trainer.settings(shards, tmp_path)
    assert examples.save_examples(tmp_path, None, load(shards), retrieval(shards, 1), settings) == FINAL


def test_the_queries_depend_on_the_seed_only(shards: Path) -> None:
    reader = Reader(load(shards))

    def texts(seed: int, shift: int) -> list[str]:
        return [query["text"] for query in examples.draw_examples(reader, retrieval(shards, shift), seed)]

    assert texts(1, 0) == texts(1, 2)
    assert len(set(texts(1, 0))) == 6
    assert texts(1, 0) != texts(2, 0)
    assert all("utterance dev" in text for text in texts(1, 0)), "these captions have no text"


def test_a_file_of_examples_is_small(shards: Path, tmp_path: Path) -> None:
    settings = test_trainer.settings(shards, tmp_path)
    name = examples.save_examples(tmp_path, 7, load(shards), retrieval(shards, 1), settings)
    assert name == "examples-00000007.json"
    assert (tmp_path / name).stat().st_size < 400_000, "even for pictures of noise"
    assert set(json.loads((tmp_path / name).read_text())) == {"split", "reranked", "queries"}


@pytest.mark.parametrize("trouble", ["sample", "disk"])
def test_a_failure_is_one_warning(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str) -> None:
    folder, run = tmp_path / "shards", tmp_path / "run"
    test_trainer.shutil.copytree(shards, folder)
    if trouble == "sample":
        run.mkdir()
        for sample in load(folder).rows("dev"):
            spoil(load(folder), int(sample))
    settings: config.Config = test_trainer.settings(folder, run)
    assert examples.save_examples(run, 7, load(folder), retrieval(folder, 0), settings) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (message,) = caplog.messages
    assert "\n" not in message
    assert "examples-00000007.json was not written" in message
    assert not run.exists() or not list(run.iterdir())
