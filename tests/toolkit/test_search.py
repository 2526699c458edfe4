"""Search: exact, as in the evaluation after re-ranking, in both directions, without loading the index."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from shards.errors import UserError
from shards.manifest import load
from tests.toolkit.evaluation.test_retrieve import CPU, SECONDS, SIZE, random_model, settings
from tests.toolkit.indexing.write_index import write_index
from tests.toolkit.indexing_files import EXPORT, other_model, save_audio, save_image, save_images
from toolkit import search as command
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.retrieve import retrieve
from toolkit.indexing import nearest as exact
from toolkit.indexing.encoder import Encoder
from toolkit.indexing.items import FileSource, ShardSource
from toolkit.indexing.nearest import nearest
from toolkit.indexing.search import Searcher
from toolkit.indexing.store import Index, write_head
from toolkit.indexing.update import update
from toolkit.model.processor import SpeechImageProcessor


@pytest.mark.parametrize("chunk", [8, 20, 1000])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_search_equals_a_naive_full_sort_with_ties(tmp_path, monkeypatch, chunk, k):
    chance = np.random.default_rng(chunk + k)
    embeddings = chance.integers(-2, 3, (203, 4)).astype(np.float32)  # small integers: many ties, exact sums
    queries = torch.from_numpy(chance.integers(-2, 3, (9, 4)).astype(np.float32))
    index = write_index(tmp_path / "index", embeddings)
    monkeypatch.setattr(exact, "_CHUNK_VALUES", chunk * 4)
    monkeypatch.setattr(exact, "_QUERIES", 4)
    scores, rows = nearest(index, queries, k)
    for query, got, values in zip(queries.numpy(), rows.tolist(), scores.tolist(), strict=True):
        expected = sorted(range(203), key=lambda row: (-float(query @ embeddings[row]), row))[:k]
        assert got == expected
        assert values == [float(query @ embeddings[row]) for row in expected]


def test_embeddings_that_are_not_finite_are_last(tmp_path):
    embeddings = np.array([[np.nan, 0], [-1, 0], [1, 0]], np.float32)
    assert nearest(write_index(tmp_path / "index", embeddings), torch.tensor([[1.0, 0.0]]), 3)[1].tolist() == [
        [2, 1, 0]
    ]


def test_an_empty_index_finds_nothing(tmp_path):
    index = write_index(tmp_path / "index", np.empty((0, 4), np.float32))
    assert nearest(index, torch.ones(2, 4), 5)[1].shape == (2, 0)


def resident(path):
    """Bytes of a mapped file that are in the memory of this process."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_the_index_is_not_loaded_into_memory(tmp_path):
    index = write_index(tmp_path / "index", np.random.default_rng(0).standard_normal((40_000, 128), np.float32))
    path = index.folder / index.head.embeddings_name
    assert resident(path) < path.stat().st_size / 4
    most = 0
    for _, chunk in index.chunks(8192):
        assert np.isfinite(chunk).all()
        most = max(most, resident(path))
    assert 0 < most < path.stat().st_size / 2
    nearest(index, torch.ones(1, 128), 10)
    assert resident(path) < path.stat().st_size / 4


def test_results_equal_those_of_the_evaluation(folder, tmp_path):
    config, model, manifest = settings(folder), random_model(), load(folder)
    export = tmp_path / "export"
    model.save_pretrained(export)
    SpeechImageProcessor(SIZE, SECONDS).save_pretrained(export)
    expected = {k: retrieve(model, manifest, "test", config, k, ProcessInfo(0, 1, CPU)) for k in (0, 4)}
    encoder = Encoder.load(export, "cpu")
    assert isinstance(encoder.processor, SpeechImageProcessor)
    sources = {modality: ShardSource(str(folder), "test", modality) for modality in ("image", "audio")}
    names = {modality: [item.name for item in source.items()] for modality, source in sources.items()}
    for modality, other in (("image", "audio"), ("audio", "image")):
        update(tmp_path / modality, sources[modality], export, batch_size=5, device="cpu", dtype="float32")
        searcher = Searcher(Index.open(tmp_path / modality), encoder, "sum")
        for k, retrieval in expected.items():
            ranking = retrieval.speech_to_image if modality == "image" else retrieval.image_to_speech
            for number, item in enumerate(sources[other].items()):
                query = encoder.encode(other, [sources[other].load(item, encoder.processor)])
                (hits,) = searcher.search(query, 10, k)
                wanted = [names[modality][place] for place in ranking.candidates[number, :10].tolist()]
                assert [hit.name for hit in hits] == wanted
                assert [hit.match is not None for hit in hits] == [rank < k for rank in range(10)]


@pytest.fixture
def index(tmp_path):
    """An index of seven images, and a spoken query."""
    pictures = save_images(tmp_path / "pictures")
    update(tmp_path / "index", FileSource(str(pictures), "image"), EXPORT, device="cpu")
    return tmp_path / "index", str(save_audio(tmp_path / "query.wav", 1))


def found(capsys, *arguments):
    capsys.readouterr()
    command.main([*map(str, arguments), "--json", "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_command_finds_images_by_voice(index, tmp_path, capsys):
    (result,) = found(capsys, *index, "--top", 3)
    assert result["query"] == index[1]
    assert [set(hit) for hit in result["results"]] == [{"row", "name", "path", "cosine", "match", "score"}] * 3
    assert all(Path(hit["path"]).is_file() for hit in result["results"])
    encoder = Encoder.load(EXPORT, "cpu")
    inputs = encoder.processor(
        images=[tmp_path / "pictures" / hit["name"] for hit in result["results"]], speech=[index[1]]
    )
    with torch.no_grad():
        images = encoder.model.get_image_features(inputs["images"])
        speech = encoder.model.get_audio_features(inputs["waveforms"], inputs["lengths"])
    cosines = [hit["cosine"] for hit in result["results"]]
    np.testing.assert_allclose((images @ speech.T)[:, 0].numpy(), cosines, atol=2e-3)
    assert cosines == sorted(cosines, reverse=True)

    (reranked,) = found(capsys, *index, "--top", 7, "--rerank", 5, "--model", EXPORT)
    weight = encoder.model.config.match_weight
    for hit in reranked["results"][:5]:
        assert hit["score"] == pytest.approx(hit["cosine"] + weight * hit["match"], abs=1e-5)
    assert [hit["match"] for hit in reranked["results"][5:]] == [None, None]

    command.main([str(index[0]), index[1], "--top", "2", index[1]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{index[1]}:"
    assert lines[1].split() == ["1", f"{cosines[0]:.4f}", result["results"][0]["path"]]
    assert len(lines) == 6


def test_command_finds_audio_files_by_an_image(tmp_path, capsys):
    for number in range(5):
        save_audio(tmp_path / "audio" / f"{number}.wav", number)
    update(tmp_path / "index", FileSource(str(tmp_path / "audio"), "audio"), EXPORT, device="cpu")
    (result,) = found(capsys, tmp_path / "index", save_image(tmp_path / "query.png", 3), "--top", 4, "--rerank", 3)
    assert all(re.fullmatch(r"\d\.wav", hit["name"]) for hit in result["results"])
    scores = [hit["score"] for hit in result["results"][:3]]
    assert scores == sorted(scores, reverse=True)


def test_candidates_of_any_length_are_scored_as_alone(index, tmp_path):
    for number in range(6):
        save_audio(tmp_path / "audio" / f"{number}.wav", number)
    wave, rate = soundfile.read(tmp_path / "audio/0.wav")
    soundfile.write(tmp_path / "audio/long.wav", np.tile(wave, 60), rate)  # of more seconds than a usual batch
    update(tmp_path / "audio-index", FileSource(str(tmp_path / "audio"), "audio"), EXPORT, device="cpu")
    encoder = Encoder.load(EXPORT, "cpu")
    (hits,) = Searcher(Index.open(tmp_path / "audio-index"), encoder).search_files(
        [str(tmp_path / "pictures/0.png")], 7, 7
    )
    assert len({hit.name for hit in hits}) == 7
    inputs = encoder.processor(images=[tmp_path / "pictures/0.png"])
    for hit in hits:
        inputs |= encoder.processor(speech=[hit.path])
        with torch.no_grad():
            speech, image = encoder.model(**inputs)
            match = float(encoder.model.match(speech, image)[0, 1])
        assert hit.match == pytest.approx(match, abs=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_candidates_that_changed_are_named_and_follow(index, tmp_path, capsys):
    (before,) = found(capsys, *index)
    gone, changed = (tmp_path / "pictures" / hit["name"] for hit in before["results"][:2])
    gone.unlink()
    save_image(changed, 99)
    command.main([str(index[0]), index[1], "--rerank", "5", "--json"])
    captured = capsys.readouterr()
    assert captured.err.count("not re-ranked; update the index") == captured.err.count("\n") == 2
    results = json.loads(captured.out)["results"]
    assert [hit["name"] for hit in results[3:5]] == [hit["name"] for hit in before["results"][:2]]
    assert [hit["match"] is None for hit in results] == [False] * 3 + [True] * 4


def test_without_a_fitted_weight_another_score_is_needed(index):
    loaded = Index.open(index[0])
    encoder = Encoder.load(EXPORT, "cpu")
    encoder.model.config.match_weight = None
    with pytest.raises(UserError, match="pass --fuse"):
        list(Searcher(loaded, encoder).search_files([index[1]], rerank=2))
    assert len(list(Searcher(loaded, encoder, "matching").search_files([index[1]], rerank=2))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "query.wav"], "/nowhere holds no index"),
        (["{index}", "/nowhere.wav"], "/nowhere.wav: no such file"),
        (["{index}", "{index}/index.json"], "cannot be decoded as audio"),
        (["{index}", "query.wav", "--model", "{other}"], "another model"),
        (["{index}", "query.wav", "--model", "/nowhere"], "no such folder"),
        (["{index}", "query.wav", "--rerank", "-1"], "--rerank -1"),
        (["{index}", "query.wav", "--top", "0"], "at least 1"),
        (["{index}"], "QUERY"),
    ],
)
def test_errors_are_one_line(index, tmp_path, arguments, message):
    other = other_model(tmp_path / "other")
    with pytest.raises(UserError, match=message) as caught:
        command.main([argument.format(index=index[0], other=other) for argument in arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["/moved/away", "some/model"])
def test_a_model_that_moved_is_named_and_not_fetched(index, place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    loaded = Index.open(index[0])
    write_head(index[0], replace(loaded.head, model_folder=place))
    with pytest.raises(UserError, match=f"is not in {place}: pass it as --model"):
        command.main([str(index[0]), index[1]])


def test_script_runs_and_fails_in_one_line():
    script = str(Path(command.__file__))
    failed = subprocess.run([sys.executable, script, "/nowhere", "query.wav"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
    assert failed.stderr.startswith("error: /nowhere")
