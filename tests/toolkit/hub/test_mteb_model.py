"""mteb runs an exported model on a task of its own classes, made from scenes; its figures equal a naive reference."""

import io
import json
import shutil
from math import log2

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import UserError
from shards.manifest import load
from shards.media.audio import read_audio
from shards.reading.reader import Reader
from tests.toolkit.indexing_files import EXPORT
from tests.toolkit.shard_runs import make
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.summaries.measures import measure
from toolkit.indexing.encoder import model_checksum
from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageModel

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
pytest.importorskip("espeakng_loader")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol  # noqa: E402

from toolkit.hub.mteb_model import SpeechImageCrossEncoder, SpeechImageEncoder  # noqa: E402

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("a2i", "i2a")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """12 images with 2 captions each: bytes of the images, bytes of the captions, the image of each caption."""
    folder = tmp_path_factory.mktemp("scenes")
    make("scenes", "--pictures", 1, "--dev", 0, "--test", 12, "--captions", 2, "--out", folder / "shards", "--jobs", 1)
    manifest = load(folder / "shards")
    reader, samples = Reader(manifest), manifest.rows("test").tolist()
    owners = [number for number, sample in enumerate(samples) for _ in manifest.captions(sample)]
    captions = [row for sample in samples for row in manifest.captions(sample)]
    return [reader.picture(sample) for sample in samples], [reader.audio(row) for row in captions], owners


def make_task(scenes, direction):
    images, captions, owners = scenes
    sides = {
        side: datasets.Dataset.from_dict(
            {"id": [f"{side}{n}" for n in range(len(files))], name: [{"bytes": data, "path": None} for data in files]}
        ).cast_column(name, feature)
        for side, name, files, feature in (
            ("i", "image", images, datasets.Image()),
            ("a", "audio", captions, datasets.Audio()),
        )
    }
    relevant: dict[str, dict[str, int]] = {}
    for caption, image in enumerate(owners):
        query, document = (f"a{caption}", f"i{image}") if direction == "a2i" else (f"i{image}", f"a{caption}")
        relevant.setdefault(query, {})[document] = 1

    class Scenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Scenes{direction.upper()}Retrieval",
            description="Scenes of shapes and their synthesized captions.",
            reference=None,
            dataset={"path": "local/scenes", "revision": "1"},
            type="Any2AnyRetrieval",
            category=direction,
            modalities=["audio", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=["Scene", "Spoken"],
            task_subtypes=["Cross-Modal Retrieval"],
            license=None,
            annotations_creators=None,
            dialect=[],
            sample_creation="created",
            bibtex_citation="",
        )

        def load_data(self, **options):
            split = {"corpus": sides[direction[2]], "queries": sides[direction[0]], "relevant_docs": relevant}
            self.dataset = {"default": {"test": split | {"top_ranked": None}}}
            self.data_loaded = True

    return Scenes()


@pytest.fixture(scope="module")
def reference(scenes):
    """Cosines and match logits of all pairs, [captions, images], and the embeddings; each input encoded alone."""
    model, processor = SpeechImageModel.from_pretrained(EXPORT), SpeechImageProcessor.from_pretrained(EXPORT)
    images, captions, _ = scenes
    with torch.inference_mode():
        pictures = [model.encode_image(**processor(images=[Image.open(io.BytesIO(data))])) for data in images]
        spoken = [model.encode_speech(**processor(speech=[read_audio(data, 60)])) for data in captions]
        cosines = [[(s.embedding @ p.embedding.T).item() for p in pictures] for s in spoken]
        logits = [[model.match(s, p)[0, 1].item() for p in pictures] for s in spoken]
    embeddings = [torch.cat([each.embedding for each in side]) for side in (spoken, pictures)]
    return np.array(cosines), np.array(logits), model.config.match_weight, embeddings


def naive(scores, correct, candidates=None):
    """Measures by their definitions, from scores [Q, N] and correct bool [Q, N]."""
    actual = {f"{measure}_at_{k}": [] for k in CUTOFFS for measure in ("ndcg", "recall", "hit_rate")}
    for row, right in zip(scores, correct, strict=True):
        order = sorted(range(len(row)), key=lambda n: -row[n])[:candidates]
        for k in CUTOFFS:
            hits = [bool(right[n]) for n in order[:k]]
            ideal = sum(1 / log2(rank + 2) for rank in range(min(k, int(right.sum()))))
            actual[f"ndcg_at_{k}"].append(sum(1 / log2(rank + 2) for rank, hit in enumerate(hits) if hit) / ideal)
            actual[f"recall_at_{k}"].append(sum(hits) / right.sum())
            actual[f"hit_rate_at_{k}"].append(float(any(hits)))
    return {name: np.mean(values) for name, values in actual.items()}


def check(result, expected):
    scores = result.task_results[0].scores["test"][0]
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=2e-5), name  # mteb rounds
    assert scores["main_score"] == scores["ndcg_at_10"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_stages_equal_a_naive_reference(scenes, reference, direction, tmp_path):
    cosines, logits, weight, _ = reference
    correct = np.array(scenes[2])[:, None] == np.arange(len(scenes[0]))
    if direction == "i2a":
        cosines, logits, correct = cosines.T, logits.T, correct.T
    coarse, task = SpeechImageEncoder(EXPORT, device="cpu", training_datasets=set()), make_task(scenes, direction)
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False, "encode_kwargs": {"batch_size": 5}}
    check(mteb.evaluate(coarse, task, prediction_folder=tmp_path, **options), naive(cosines, correct))

    fine = SpeechImageCrossEncoder(EXPORT, device="cpu", training_datasets=set())
    k = 6
    kept = np.argsort(np.argsort(-cosines, axis=1), axis=1) < k
    scores = np.where(kept, cosines + weight * logits, -np.inf)
    expected = naive(scores, correct, k)
    assert expected != naive(cosines, correct, k), "re-ranking should change something here"
    reranking = make_task(scenes, direction).convert_to_reranking(tmp_path, top_k=k)
    check(mteb.evaluate(fine, reranking, **options), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_toolkits_own_measures_are_mtebs(scenes, reference, direction):
    rankings = rank_both(*reference[3], torch.tensor(scenes[2]), k=10)
    ours = measure(rankings[DIRECTIONS.index(direction)])
    coarse = SpeechImageEncoder(EXPORT, device="cpu", training_datasets=set())
    result = mteb.evaluate(coarse, make_task(scenes, direction), cache=None, co2_tracker=False, show_progress_bar=False)
    check(result, {name.lower().replace("@", "_at_"): value / 100 for name, value in ours.items()})


def test_the_encoder_embeds_as_the_model_does(scenes, reference):
    encoder = SpeechImageEncoder(EXPORT, device="cpu", training_datasets=set())
    task = make_task(scenes, "a2i")
    task.load_data()
    split = task.dataset["default"]["test"]
    embeddings = {
        side: encoder.encode(torch.utils.data.DataLoader(split[side]), task_metadata=task.metadata, batch_size=7)
        for side in ("queries", "corpus")
    }
    assert np.abs(embeddings["queries"] @ embeddings["corpus"].T - reference[0]).max() <= 1e-5
    assert np.abs(encoder.similarity(embeddings["queries"], embeddings["corpus"]).numpy() - reference[0]).max() <= 1e-5


def test_decoded_audio_is_taken_as_it_is():
    """Arrays with their sampling rate, as some tasks have them."""
    from toolkit.hub.mteb_model import _wave

    wave = (0.5 * np.sin(np.arange(800) / 5)).astype(np.float32)
    assert np.array_equal(_wave({"array": wave, "sampling_rate": 16000}), wave)
    assert np.allclose(_wave({"array": np.stack([wave, wave]), "sampling_rate": 16000}), wave)
    assert len(_wave({"array": wave, "sampling_rate": 8000})) == 1600


def test_what_mteb_stores_of_the_model():
    encoder = SpeechImageEncoder(EXPORT, device="cpu", training_datasets={"FlickrAudioToImageRetrieval"}, name="me/x")
    fine = SpeechImageCrossEncoder(EXPORT, device="cpu", training_datasets=set())
    meta = encoder.mteb_model_meta
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(encoder, CrossEncoderProtocol)
    assert isinstance(fine, CrossEncoderProtocol)
    assert (meta.name, meta.revision, meta.modalities) == ("me/x", model_checksum(EXPORT), ["audio", "image"])
    assert (meta.training_datasets, meta.is_cross_encoder) == ({"FlickrAudioToImageRetrieval"}, False)
    assert meta.n_parameters == sum(p.numel() for p in SpeechImageModel.from_pretrained(EXPORT).parameters())
    assert (fine.mteb_model_meta.name, fine.mteb_model_meta.is_cross_encoder) == ("local/best-reranked-fitted", True)


def test_refusals_are_one_line(scenes, tmp_path):
    encoder = SpeechImageEncoder(EXPORT, device="cpu", training_datasets=set())
    fine = SpeechImageCrossEncoder(EXPORT, device="cpu", training_datasets=set())
    task = make_task(scenes, "a2i")
    text = torch.utils.data.DataLoader(datasets.Dataset.from_dict({"id": ["1"], "text": ["a red circle"]}))
    with pytest.raises(UserError, match="ScenesA2IRetrieval has inputs of text: expected audio or images alone"):
        encoder.encode(text, task_metadata=task.metadata)
    task.load_data()
    images = torch.utils.data.DataLoader(task.dataset["default"]["test"]["corpus"])
    with pytest.raises(UserError, match="audio on one side and images on the other"):
        fine.predict(images, images, task_metadata=task.metadata)
    shutil.copytree(EXPORT, tmp_path / "unfitted")
    config = tmp_path / "unfitted/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "match_weight": None}))
    with pytest.raises(UserError, match="no fitted weight"):
        SpeechImageCrossEncoder(tmp_path / "unfitted", device="cpu", training_datasets=set())
    SpeechImageCrossEncoder(tmp_path / "unfitted", device="cpu", training_datasets=set(), fuse="sum")
