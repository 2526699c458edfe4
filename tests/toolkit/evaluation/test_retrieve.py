"""Encoding and ranking with a small random model, against separate encoding and loops, on one and several ranks."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.manifest import load
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.media.picture import decode_picture
from shards.reading.reader import Reader
from tests.distributed import run_ranks
from tests.shards.media.noise import spoil
from tests.tiny import tiny_model
from toolkit.config import schema as config
from toolkit.evaluation.encode import ProcessInfo, _batch_sizes, encode
from toolkit.evaluation.retrieve import retrieve
from toolkit.model.build import build_model

CPU = torch.device("cpu")
SIZE, SECONDS = 32, 1.0
USUAL = 0.6  # seconds; batches of longer captions are smaller


def measure(model, manifest, split, settings, rerank, rank, world_size, device):
    return retrieve(model, manifest, split, settings, rerank, ProcessInfo(rank, world_size, device)).report


def drawn(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST)


def spoken(seed):
    chance = np.random.default_rng(seed)
    seconds = chance.uniform(0.2, 1.4)  # some are truncated
    pitch = chance.uniform(80, 3000)
    wave = np.sin(2 * np.pi * pitch * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)
    return (0.5 * wave + 0.1 * chance.standard_normal(len(wave))).astype(np.float32)[None].clip(-1, 1), SAMPLE_RATE


def item(number, name, split, twin=None):
    several = range(1 + number % 3)
    captions = [Caption(f"{name}/{n}", partial(spoken, 100 * number + n), f"caption {n} of {name}") for n in several]
    return Item(name, split, partial(drawn, number), tuple(captions), twin)


def settings(folder, fuse="sum"):
    return config.Config(
        data=config.Data(shards=str(folder), image_size=SIZE, max_seconds=USUAL, workers=1),
        model=tiny_model(),
        evaluation=config.Evaluation(batch_size=4, max_seconds=SECONDS, fuse=fuse),
        final=config.Final(split="test", rerank=4),
    )


def random_model():
    torch.manual_seed(0)
    model = build_model(tiny_model())
    with torch.no_grad():  # larger match logits, as after training
        model.match_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def singly(folder):
    """Every picture and caption of the shards encoded separately: lists of Encoded by sample and by caption row."""
    manifest, model = load(folder), random_model().eval()
    reader, images, speech = Reader(manifest), [], []
    with torch.no_grad():
        for sample in range(len(manifest.key)):
            pixels = torch.from_numpy(decode_picture(reader.picture(sample), SIZE))
            images.append(model.encode_image(pixels[None]))
        for row in range(len(manifest.duration)):
            wave = torch.from_numpy(decode_audio(reader.audio(row)))[: int(SECONDS * SAMPLE_RATE)]
            speech.append(model.encode_speech(wave[None], torch.tensor([len(wave)])))
    return manifest, model, images, speech


def cosine(spoken, shown):
    return float(spoken.embedding[0] @ shown.embedding[0])


@torch.no_grad()
def matching(model, fuse, spoken, shown):
    return float(model.match(spoken, shown)[0, 1]) + (cosine(spoken, shown) if fuse == "sum" else 0.0)


def naive_recall(queries, answers, score, rescore, is_right, k):
    """R@1, R@5, R@10: sort all candidates by one score, then the first k by the other."""
    places = []
    for query in queries:
        order = sorted(answers, key=lambda answer: -score(query, answer))
        order = sorted(order[:k], key=lambda answer: -rescore(query, answer)) + order[k:]
        places.append(next(n for n, answer in enumerate(order) if is_right(query, answer)))
    recall = {f"R@{k}": 100 * sum(place < k for place in places) / len(places) for k in (1, 5, 10)}
    return pytest.approx(recall, abs=1e-3)


def test_each_picture_and_caption_is_encoded_once_and_independently_of_its_batch(singly):
    manifest, model, images, speech = singly
    samples = manifest.rows("test")
    calls, encode_image = [], model.encode_image
    model.encode_image = lambda pixels: calls.append(len(pixels)) or encode_image(pixels)
    shapes, encode_speech = [], model.encode_speech
    model.encode_speech = lambda waves, each: shapes.append(tuple(waves.shape)) or encode_speech(waves, each)
    with torch.no_grad():
        encodings = encode(model, manifest, samples, settings(manifest.folder), ProcessInfo(0, 1, CPU))
    del model.encode_image, model.encode_speech
    assert calls == [4, 4, 4, 1], "13 pictures in batches of 4"
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True), "captions were not batched by length"
    assert lengths[0] == SECONDS * SAMPLE_RATE, "data.max_seconds is training's limit"
    room = 4 * USUAL * SAMPLE_RATE
    assert {rows for rows, length in shapes if length > USUAL * SAMPLE_RATE} == {2, 3}
    assert all(rows == 4 or rows * length <= room for rows, length in shapes[:-1])
    assert any(rows == 4 for rows, _ in shapes)
    assert encodings.captions.tolist() == [row for sample in samples for row in manifest.captions(sample)]
    owners = [at for at, sample in enumerate(samples) for _ in manifest.captions(sample)]
    assert encodings.caption_picture.tolist() == owners
    for at, sample in enumerate(samples):
        torch.testing.assert_close(encodings.images[at], images[sample].embedding[0], atol=1e-5, rtol=0)
    for at, row in enumerate(encodings.captions):
        torch.testing.assert_close(encodings.speech[at], speech[row].embedding[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [60.0, 1.2])
def test_captions_are_truncated_at_the_limit_of_evaluation(folder, limit):
    """Not at that of training."""
    manifest, model, settled = load(folder), random_model().eval(), settings(folder)
    settled.evaluation.max_seconds = limit
    samples = manifest.rows("test")
    with torch.no_grad():
        encodings = encode(model, manifest, samples, settled, ProcessInfo(0, 1, CPU))
        longest = int(encodings.captions[np.argmax(manifest.duration[encodings.captions])])
        wave = torch.from_numpy(decode_audio(Reader(manifest).audio(longest)))
        assert len(wave) > 1.2 * SAMPLE_RATE
        cut = wave[: int(limit * SAMPLE_RATE)]
        alone = model.encode_speech(cut[None], torch.tensor([len(cut)])).embedding[0]
    at = encodings.captions.tolist().index(longest)
    torch.testing.assert_close(encodings.speech[at], alone, atol=1e-5, rtol=0)
    assert measure(model, manifest, "test", settled, 4, 0, 1, CPU)["max_seconds"] == limit
    assert config.Evaluation().max_seconds >= 30, "the longest caption that make_shards takes by default"


def test_long_captions_take_no_more_memory_than_usual_ones():
    """Batch sizes for equal lengths, for lengths above and below the usual one, and for one very long caption."""
    assert _batch_sizes(np.array([8.0] * 10, np.float32), 4, 8.0) == [4, 4, 4]
    assert _batch_sizes(np.array([60, 33, 16, 16, 9, 8, 8, 8, 8, 1], np.float32), 4, 8.0) == [1, 1, 2, 3, 4]
    assert _batch_sizes(np.array([], np.float32), 4, 8.0) == []


@pytest.mark.parametrize("fuse", ["matching", "sum"])
def test_report_equals_loops(singly, fuse):
    manifest, model, images, speech = singly
    k = 4
    report = measure(model, manifest, "test", settings(manifest.folder, fuse), k, 0, 1, CPU)
    pictures = manifest.rows("test").tolist()
    owner = {row: sample for sample in pictures for row in manifest.captions(sample)}
    captions = list(owner)
    assert (report["split"], report["pictures"], report["captions"]) == ("test", 13, len(captions))
    assert report["max_seconds"] == SECONDS

    for name, rescore in (("coarse", cosine), ("reranked", partial(matching, model, fuse))):
        assert report[name]["speech_to_image"] == naive_recall(
            captions, pictures, lambda c, p: cosine(speech[c], images[p]),
            lambda c, p, by=rescore: by(speech[c], images[p]), lambda c, p: owner[c] == p, k,
        )  # fmt: skip
        assert report[name]["image_to_speech"] == naive_recall(
            pictures, captions, lambda p, c: cosine(speech[c], images[p]),
            lambda p, c, by=rescore: by(speech[c], images[p]), lambda p, c: owner[c] == p, k,
        )  # fmt: skip
        both = report[name]["speech_to_image"]["R@1"] + report[name]["image_to_speech"]["R@1"]
        assert report[name]["mean_R@1"] == pytest.approx(both / 2, abs=1e-3)
    assert (report["reranked"]["k"], report["reranked"]["fuse"]) == (k, fuse)
    assert report["reranked"]["seconds_per_query"] > 0
    assert report["coarse"] != {key: report["reranked"][key] for key in report["coarse"]}, "re-ranking changed nothing"


def test_minimal_pairs_equal_loops(singly):
    manifest, model, images, speech = singly
    report = measure(model, manifest, "test", settings(manifest.folder), 4, 0, 1, CPU)["twins"]
    won = {"coarse": [], "matching": []}
    kinds = []
    for twin in manifest.rows("twins").tolist():
        original = int(manifest.twin[twin])
        for right, wrong in ((original, twin), (twin, original)):
            for row in manifest.captions(right):
                kinds.append(manifest.image_id[twin].decode().split("-")[1])
                for name, score in (("coarse", cosine), ("matching", partial(matching, model, "sum"))):
                    won[name].append(score(speech[row], images[right]) > score(speech[row], images[wrong]))
    assert report["questions"] == len(kinds)
    for name, points in won.items():
        assert report[name] == pytest.approx(100 * np.mean(points), abs=1e-3)
        for kind in ("colour", "relation"):
            own = [point for point, each in zip(points, kinds, strict=True) if each == kind]
            assert report["kinds"][kind][name] == pytest.approx(100 * np.mean(own), abs=1e-3)


def test_coarse_only_keeps_no_tokens_and_other_splits_have_no_minimal_pairs(folder):
    manifest, model = load(folder), random_model()
    model.match = None
    model.train()
    result = retrieve(model, manifest, "test", settings(folder), 0, ProcessInfo(0, 1, CPU))
    assert result.report["reranked"] is None
    assert result.report["twins"]["matching"] is None
    assert model.training, "the model's mode was not restored"
    assert measure(model, manifest, "train", settings(folder), 0, 0, 1, CPU)["twins"] is None
    with pytest.raises(UserError, match=r"no split 'nope'.*train, test, twins"):
        measure(model, manifest, "nope", settings(folder), 0, 0, 1, CPU)


def reason_on(rank, world_size, folder):
    with pytest.raises(UserError) as caught:
        measure(random_model(), load(folder), "test", settings(folder), 0, rank, world_size, CPU)
    return str(caught.value)


def test_a_damaged_sample_is_named_and_fails_on_all_ranks(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    manifest = load(tmp_path)
    spoil(manifest, int(manifest.rows("test")[0]))  # rank 0 reads it
    reasons = run_ranks(reason_on, 2, tmp_path)
    key = manifest.key[int(manifest.rows("test")[0])].decode()
    assert re.match(f"sample {key} of .*: .* make the shards again", reasons[0])
    assert reasons[1] == f"rank 0: {reasons[0]}"


def on_rank(rank, world_size, folder):
    """The metrics in fp32 and bf16, the bytes of all embeddings, and the calls of the model on this rank."""
    torch.set_num_threads(1)  # for bitwise equality
    model, manifest, calls = random_model(), load(folder), []
    for name in ("encode_image", "encode_speech", "match"):
        inner = getattr(model, name)
        setattr(model, name, lambda *inputs, name=name, inner=inner: calls.append(name) or inner(*inputs))
    samples, process = manifest.rows("test"), ProcessInfo(rank, world_size, CPU)
    with torch.no_grad():
        encodings = encode(model.eval(), manifest, samples, settings(folder), process)
    embeddings = encodings.images.numpy().tobytes() + encodings.speech.numpy().tobytes()
    reports = []
    for each in (model, model.bfloat16()):
        reports.append(measure(each, manifest, "test", settings(folder), 4, rank, world_size, CPU))
        del reports[-1]["reranked"]["seconds_per_query"]
    return (reports, embeddings), calls


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_are_bitwise_equal_for_any_world_size_with_equally_many_calls(folder, world_size):
    threads = torch.get_num_threads()
    alone, _ = on_rank(0, 1, folder)
    torch.set_num_threads(threads)
    results = run_ranks(on_rank, world_size, folder)
    for rank, (distributed, _) in enumerate(results):
        assert distributed == alone, f"rank {rank} of {world_size}"
    assert len({tuple(calls) for _, calls in results}) == 1, "under ZeRO-3, unequal numbers of calls deadlock"
