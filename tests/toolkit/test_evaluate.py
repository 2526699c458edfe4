"""A whole evaluation of a small random model: against one-at-a-time encoding and loops, on one and several ranks."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

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
from shards.writing.writer import Format, write_shards
from tests.distributed import run_ranks
from tests.shards.media.noise import spoil
from tests.tiny import tiny_model
from toolkit import evaluate
from toolkit.config import schema as config
from toolkit.evaluation.encode import ProcessInfo, _batch_sizes, encode
from toolkit.evaluation.retrieve import retrieve
from toolkit.model.build import build_model
from toolkit.run_folder import to_yaml

ROOT = Path(__file__).resolve().parents[2]
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
    seconds = chance.uniform(0.2, 1.4)  # some longer than what is read of them
    pitch = chance.uniform(80, 3000)
    wave = np.sin(2 * np.pi * pitch * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)
    return (0.5 * wave + 0.1 * chance.standard_normal(len(wave))).astype(np.float32)[None].clip(-1, 1), SAMPLE_RATE


def item(number, name, split, twin=None):
    several = range(1 + number % 3)
    captions = [Caption(f"{name}/{n}", partial(spoken, 100 * number + n), f"caption {n} of {name}") for n in several]
    return Item(name, split, partial(drawn, number), tuple(captions), twin)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 3 train and 13 test pictures of 1 to 3 captions, and twins of test pictures 2, 3, 4 and 5."""
    items = [item(number, f"train{number}", "train") for number in range(3)]
    items += [item(number, f"test{number}", "test") for number in range(13)]
    for number in range(2, 6):
        kind = ("colour", "relation")[number % 2]
        items.append(item(40 + number, f"test{number}-{kind}", "twins", twin=f"test{number}"))
    out = tmp_path_factory.mktemp("shards") / "toy"
    write_shards(items, out, "toy", Format(samples_per_shard=5), {})
    return out


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
    with torch.no_grad():  # spread the match logits out, as training does
        model.match_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def singly(folder):
    """Every picture and caption of the shards encoded by itself: lists of Encoded by sample and by caption row."""
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
    """R@1, R@5, R@10: sort all answers by score, then the first k by the other score."""
    places = []
    for query in queries:
        order = sorted(answers, key=lambda answer: -score(query, answer))
        order = sorted(order[:k], key=lambda answer: -rescore(query, answer)) + order[k:]
        places.append(next(n for n, answer in enumerate(order) if is_right(query, answer)))
    recall = {f"R@{k}": 100 * sum(place < k for place in places) / len(places) for k in (1, 5, 10)}
    return pytest.approx(recall, abs=1e-3)


def test_each_picture_and_caption_is_encoded_once_and_as_if_alone(singly):
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
    assert encodings.picture.tolist() == owners
    for at, sample in enumerate(samples):
        torch.testing.assert_close(encodings.images[at], images[sample].embedding[0], atol=1e-5, rtol=0)
    for at, row in enumerate(encodings.captions):
        torch.testing.assert_close(encodings.speech[at], speech[row].embedding[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [60.0, 1.2])
def test_captions_are_heard_whole_up_to_the_evaluations_own_limit(folder, limit):
    """Not cut at the length that training cuts at."""
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
    """Sizes of batches: at one length, at lengths above and below it, and where one caption alone is more."""
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


def test_twins_equal_loops(singly):
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


def test_coarse_only_keeps_no_tokens_and_other_splits_have_no_twins(folder):
    manifest, model = load(folder), random_model()
    model.match = None
    model.train()
    found = retrieve(model, manifest, "test", settings(folder), 0, ProcessInfo(0, 1, CPU))
    assert found.report["reranked"] is None
    assert found.report["twins"]["matching"] is None
    assert model.training, "the model's mode was not restored"
    assert measure(model, manifest, "train", settings(folder), 0, 0, 1, CPU)["twins"] is None
    with pytest.raises(UserError, match=r"no split 'nope'.*train, test, twins"):
        measure(model, manifest, "nope", settings(folder), 0, 0, 1, CPU)


def test_a_damaged_sample_is_named(folder, tmp_path):
    manifest = load(folder)
    shard = manifest.shards[int(manifest.shard[4])].name
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == shard:
            start = int(manifest.image_offset[4])
            data[start : start + int(manifest.image_bytes[4])] = bytes(int(manifest.image_bytes[4]))
        (tmp_path / path.name).write_bytes(data)
    key = manifest.key[4].decode()
    with pytest.raises(UserError, match=f"sample {key} of .*: .* make the shards again"):
        measure(random_model(), load(tmp_path), "test", settings(tmp_path), 0, 0, 1, CPU)


def reason_on(rank, world_size, folder):
    with pytest.raises(UserError) as caught:
        measure(random_model(), load(folder), "test", settings(folder), 0, rank, world_size, CPU)
    return str(caught.value)


def test_a_damaged_sample_ends_all_ranks_with_the_reason(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    manifest = load(tmp_path)
    spoil(manifest, int(manifest.rows("test")[0]))  # rank 0 reads it
    reasons = run_ranks(reason_on, 2, tmp_path)
    assert all("make the shards again" in reason for reason in reasons)
    assert reasons[1] == f"rank 0: {reasons[0]}"


def on_rank(rank, world_size, folder):
    """The figures in fp32 and bf16, the bytes of all embeddings, and how often this rank called the model."""
    torch.set_num_threads(1)  # or the bits differ
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
def test_any_number_of_ranks_gives_the_same_bits_with_equally_many_calls(folder, world_size):
    threads = torch.get_num_threads()
    alone, _ = on_rank(0, 1, folder)
    torch.set_num_threads(threads)
    results = run_ranks(on_rank, world_size, folder)
    for rank, (found, _) in enumerate(results):
        assert found == alone, f"rank {rank} of {world_size}"
    assert len({tuple(calls) for _, calls in results}) == 1, "under ZeRO-3 ranks that differ in calls wait for ever"


@pytest.fixture
def run(folder, tmp_path):
    """A run folder as training leaves it."""
    (tmp_path / "config.yaml").write_text(to_yaml(settings(folder)))
    export = tmp_path / "export" / "best"
    random_model().save_pretrained(export)
    (export / "progress.json").write_text(json.dumps({"step": 1234}))
    return tmp_path


def test_command_writes_recall_and_picture_and_prints_a_table(run, monkeypatch, capsys):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    evaluate.main(["--run", str(run)])
    report = json.loads((run / "recall.json").read_text())
    figures = {"R@1", "R@5", "R@10"}
    assert set(report) == {
        "split", "pictures", "captions", "max_seconds", "coarse", "reranked", "twins", "shards", "checkpoint", "step",
    }  # fmt: skip
    assert (report["split"], report["checkpoint"], report["step"]) == ("test", "best", 1234)
    assert set(report["coarse"]) == {"speech_to_image", "image_to_speech", "mean_R@1"}
    assert set(report["reranked"]) == {*report["coarse"], "k", "fuse", "seconds_per_query"}
    assert set(report["coarse"]["image_to_speech"]) == set(report["reranked"]["speech_to_image"]) == figures
    assert set(report["twins"]) == {"coarse", "matching", "questions", "kinds"}
    assert set(report["twins"]["kinds"]) == {"colour", "relation"}
    with Image.open(run / "retrieved.png") as page:
        assert page.format == "PNG"
        assert page.width > 500
    printed = capsys.readouterr().out
    assert "toy test, checkpoint best (step 1,234): 13 pictures" in printed
    assert f"{report['reranked']['mean_R@1']:.1f}" in printed
    assert not [path.name for path in run.iterdir() if "tmp" in path.name]


def results(run):
    """The bytes of the results in a run folder, by name."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name.startswith(("recall", "retrieved"))}


def moved(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "moved")
    return ["--data.shards", str(tmp_path / "moved")]


def others(folder, tmp_path, monkeypatch):
    write_shards([item(7, "other", "test")], tmp_path / "others", "toy", Format(), {})
    return ["--data.shards", str(tmp_path / "others")]


def made_again(folder, tmp_path, monkeypatch):
    """Other data in the place that the run's configuration names."""
    shards = tmp_path / "again"
    write_shards([item(8, "again", "test")], shards, "toy", Format(), {})
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text().replace(str(folder), str(shards)))
    return []


def checkpoint(run, data):
    """The marker of a checkpoint that was trained on some data."""
    shared = {"name": "shared.safetensors", "bytes": 0, "sha256": ""}
    state = {"format": 2, "config": "", "data": data, "files": [shared], "applied_steps": 1}
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "checkpoints/step-00000001/progress.json").write_text(json.dumps(state))


OF = r"-{}-[0-9a-f]{{8}}"


@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        ([], ""),
        (["--split", "test", "--rerank", "4", "--checkpoint", "best"], ""),
        (["--evaluation.batch_size", "3", "--data.workers", "0"], ""),
        (moved, ""),
        (["--split", "train"], OF.format("train")),
        (["--final.split", "train"], OF.format("train")),
        (["--rerank", "3"], OF.format("test") + "-rerank-3"),
        (["--rerank", "0", "--checkpoint", "last"], OF.format("test") + "-rerank-0-checkpoint-last"),
        (["--data.max_seconds", "0.5"], ""),
        (["--evaluation.max_seconds", "0.5"], OF.format("test") + "-max_seconds-0.5"),
        (["--evaluation.fuse", "matching"], OF.format("test") + "-fuse-matching"),
        (["--data.resize", "squash"], OF.format("test") + "-resize-squash"),
        (others, OF.format("test")),
        (made_again, OF.format("test")),
    ],
)
def test_only_the_final_evaluation_has_the_name_of_the_runs_result(
    run, folder, tmp_path, monkeypatch, capsys, arguments, suffix
):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    random_model().save_pretrained(run / "export" / "last")
    checkpoint(run, [load(folder).hash])
    evaluate.main(["--run", str(run)])
    before = results(run)
    assert set(before) == {"recall.json", "retrieved.png"}
    capsys.readouterr()
    given = arguments if isinstance(arguments, list) else arguments(folder, tmp_path, monkeypatch)
    evaluate.main(["--run", str(run), *given])
    printed, after = capsys.readouterr().out, results(run)
    if not suffix:
        assert set(after) == set(before)
        assert f"recall: {run / 'recall.json'}\n" in printed
        return
    assert before.items() <= after.items(), "the run's own result was overwritten"
    names = sorted(set(after) - set(before))
    for name, pattern in zip(names, (rf"recall{suffix}\.json", rf"retrieved{suffix}\.png"), strict=True):
        assert re.fullmatch(pattern, name)
        assert str(run / name) in printed
    report = json.loads(after[names[0]])
    assert f"{report['split']}-{load(report['shards']).hash[:8]}" in names[0]


@pytest.mark.parametrize("made", [moved, others])
def test_without_a_checkpoint_the_name_of_the_shards_tells_whether_they_are_the_runs_own(
    run, folder, tmp_path, monkeypatch, made
):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    evaluate.main(["--run", str(run), *made(folder, tmp_path, monkeypatch)])
    assert "recall.json" not in results(run)
    evaluate.main(["--run", str(run), "--data.shards", str(folder / ".." / folder.name)])
    assert "recall.json" in results(run)


def test_a_run_without_matching_keeps_its_result_under_its_own_name(run, folder, monkeypatch):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    evaluate.main(["--run", str(run)])
    assert set(results(run)) == {"recall.json", "retrieved.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "no split 'val'"),
        (["--checkpoint", "last"], "no exported model last: .* holds best"),
        (["--rerank", "-1"], "--rerank -1"),
        (["--run", "/nowhere/at/all"], "/nowhere/at/all is not a run folder"),
        (["--data.shards", "/nowhere"], "no shards in /nowhere"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(["--run", str(run), *arguments])
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_export_is_one_line(run, monkeypatch):
    monkeypatch.setattr("toolkit.distributed.initialise", lambda: (0, 1, CPU))
    weights = run / "export" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded as a model") as caught:
        evaluate.main(["--run", str(run)])
    assert "\n" not in str(caught.value)
    (run / "export" / "best" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no exported model yet"):
        evaluate.main(["--run", str(run)])


def test_a_run_without_matching_is_not_reranked(run, folder, capsys):
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    assert evaluate.read_arguments(["--run", str(run), "--rerank", "8"])[2] == 0
    assert "not re-ranked" in capsys.readouterr().err


def test_help_and_mistakes_need_no_torch():
    script = str(ROOT / "toolkit" / "evaluate.py")
    shown = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--rerank" in shown.stdout
    assert " torch\n" not in shown.stderr
    wrong = subprocess.run([sys.executable, script, "--run", "/nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: /nowhere")
    assert wrong.stderr.count("\n") == 1
