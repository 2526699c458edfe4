"""Looking inside a small random model: distributions, attention and denoising against loops, and the files."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import UserError
from shards.manifest import load
from shards.reading.reader import Reader
from tests.toolkit.evaluation import test_retrieve
from tests.toolkit.evaluation.test_retrieve import CPU, cosine, random_model, settings
from toolkit import analyze
from toolkit.config.schema import Denoising
from toolkit.evaluation.attention import CrossAttention
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.inside import result as files
from toolkit.evaluation.inside.denoising import RATIOS, denoising_curves
from toolkit.evaluation.inside.measure import HARDEST, InsideLook
from toolkit.evaluation.inside.overlays import attention_in, draw_attention, overlay, spans_of
from toolkit.evaluation.inside.page import write_page
from toolkit.evaluation.inside.similarity import FOUND, rank_histogram
from toolkit.evaluation.inside.words import Word
from toolkit.evaluation.recall import RankCounts, Ranking
from toolkit.model.outputs import Encoded
from toolkit.run_folder import to_yaml

singly = test_retrieve.singly


@pytest.fixture(scope="module")
def look(folder):
    manifest = load(folder)
    process = ProcessInfo(0, 1, CPU)
    return InsideLook(random_model().eval(), manifest, "test", manifest.rows("test"), settings(folder), process)


def test_gap_similarities_and_ranks_equal_loops(look, singly):
    manifest, _, images, speech = singly
    found = look.distributions()
    pictures = manifest.rows("test").tolist()
    owner = {row: sample for sample in pictures for row in manifest.captions(sample)}
    right = [cosine(speech[row], images[sample]) for row, sample in owner.items()]
    wrong = [cosine(speech[row], images[other]) for row in owner for other in pictures if other != owner[row]]
    assert found["gap"]["right"] == pytest.approx(np.mean(right), abs=1e-5)
    assert found["gap"]["wrong"] == pytest.approx(np.mean(wrong), abs=1e-5)
    means = [
        torch.cat([each[n].embedding for n in rows]).mean(0) for each, rows in ((speech, owner), (images, pictures))
    ]
    assert found["gap"]["centroids"] == pytest.approx(float((means[0] - means[1]).norm()), abs=1e-5)
    for name, values in (("right", right), ("wrong", wrong)):
        counts = np.histogram(values, found["similarity"]["edges"])[0]
        assert np.abs(counts - found["similarity"][name]).sum() <= 2, "a cosine at an edge may fall on either side"
        assert sum(found["similarity"][name]) == len(values)

    ranks = {}
    for row, sample in owner.items():
        ahead = [
            other for other in pictures if cosine(speech[row], images[other]) > cosine(speech[row], images[sample])
        ]
        ranks[row] = 1 + len(ahead)
    histogram = found["ranks"]["speech_to_image"]
    assert histogram["counts"] == np.histogram(list(ranks.values()), [*histogram["edges"][:-1], 1e9])[0].tolist()
    assert sum(found["ranks"]["image_to_speech"]["counts"]) == len(pictures)

    hardest = found["hardest"]["speech_to_image"]
    assert len(hardest) == HARDEST
    assert [each["rank"] for each in hardest] == sorted(ranks.values(), reverse=True)[:HARDEST]
    for each in hardest:
        row, sample = each["query"]["caption"], each["answer"]["sample"]
        assert (ranks[row], owner[row]) == (each["rank"], sample)
        assert each["query"]["text"].startswith("caption ")
        best = sorted(pictures, key=lambda other: -cosine(speech[row], images[other]))[:5]
        assert [reference["sample"] for reference in each["found"]] == best
    for each in found["hardest"]["image_to_speech"]:
        assert owner[each["answer"]["caption"]] == each["query"]["sample"]


def test_rank_histogram_has_a_last_bin_for_the_highest_rank():
    def histogram(*ahead):
        counts = RankCounts(torch.tensor(ahead), torch.zeros(len(ahead)), torch.ones(len(ahead)))
        counts.tied = torch.zeros(len(ahead), dtype=torch.int64)
        return rank_histogram(Ranking(counts, torch.zeros(len(ahead), 1)))

    assert histogram(0, 0) == {"edges": [1, 2], "counts": [2]}
    assert histogram(0, 5, 9, 10) == {"edges": [1, 2, 3, 4, 5, 6, 11, 21], "counts": [1, 0, 0, 0, 0, 2, 1]}
    assert histogram(5000) == {
        "edges": [1, 2, 3, 4, 5, 6, 11, 21, 51, 101, 201, 501, 1001, 5002],
        "counts": [0] * 12 + [1],
    }


def test_attention_is_drawn_with_its_words(look):
    pairs, drawings = look.attention()
    assert len(pairs) == len(drawings) == 8
    for pair in pairs:
        assert 0 < pair["match"] < 1
        assert [word["word"] for word in pair["words"]] == pair["query"]["text"].split()
        assert Image.open(io.BytesIO(drawings[pair["image"]])).format == "PNG"


def test_attention_of_a_word_is_that_of_its_frames():
    frames = torch.eye(4)  # each frame attends to a patch of its own
    assert attention_in(frames, 2.0, Word("x", 0.5, 1.5)).tolist() == pytest.approx([0, 0.5, 0.5, 0])
    assert attention_in(frames, 2.0, Word("x", 0.75, 1.0)).tolist() == pytest.approx([0, 1, 0, 0])
    assert attention_in(frames, 2.0, Word("x", 2.5, 3.0)).tolist() == pytest.approx([0, 0, 0, 1])
    assert [(span.start, span.end) for span in spans_of(1.1)] == pytest.approx([(0, 0.55), (0.55, 1.1)])


def test_overlay_is_brightest_where_the_attention_is():
    gray = Image.new("RGB", (40, 40), (128, 128, 128))
    drawn = np.asarray(overlay(gray, torch.tensor([0.0, 0.0, 1.0, 0.0]), 1.0)).astype(int)
    red = drawn[..., 0] - drawn[..., 1]
    assert red[35, 5] > red[5, 5] == 0
    assert drawn[5, 35].sum() < 3 * 128
    one_layer = CrossAttention(torch.empty(0, 4), torch.full((4,), 0.25), torch.zeros(2))
    page = draw_attention(np.zeros((3, 8, 8), np.uint8), one_layer, 1.0, [Word("a", 0, 1)], "a")
    assert Image.open(io.BytesIO(page)).width < 3 * 160, "words are drawn though no frame attends"


def encoded(seed):
    tokens = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(seed))
    return Encoded(tokens[:, 0], tokens, torch.arange(10)[None] < torch.tensor([10, 9, 8, 10, 10, 7])[:, None])


def test_denoising_distances_equal_loops():
    """A denoiser that returns its context, or without one the noised tokens."""
    speech, image = encoded(0), encoded(1)
    image.mask[:] = True

    def denoiser(noised, mask, context, context_mask=None):
        return noised if context is None else noised * 0 + context

    noise = Denoising(side="image", noise="gaussian", snr_db=0.0, swap_group=3)
    curves = denoising_curves({"image": denoiser}, [(speech, image, torch.arange(6))], noise)["image"]
    assert curves["ratio"] == list(RATIOS)
    assert curves["noised"][0] == pytest.approx(0, abs=1e-6)
    assert all(0.1 < value < 0.5 for value in curves["noised"][1:]), "gaussian noise at 0 dB halves the power"
    assert curves["none"] == curves["noised"]
    for name, context in (("right", speech.tokens), ("other", speech.tokens.roll(1, 0))):
        expected = 1 - torch.nn.functional.cosine_similarity(context, image.tokens, dim=-1)
        assert curves[name][0] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert curves[name][-1] == pytest.approx(float(expected.mean()), abs=1e-5), "at ratio 1 all tokens count"
    both = denoising_curves({"speech": denoiser}, [(speech, image, torch.arange(6))], replace(noise, span=2))["speech"]
    distance = 1 - torch.nn.functional.cosine_similarity(image.tokens, speech.tokens, dim=-1)
    clean = np.mean([float(row[mask].mean()) for row, mask in zip(distance, speech.mask, strict=True)])
    assert both["right"][0] == pytest.approx(clean, abs=1e-5), "padding counts"


def test_without_pairs_denoising_has_a_reason():
    assert "reason" in denoising_curves({"image": None}, [], Denoising())


def result(run, **values):
    names = ("run", "shards", "corpus", "split", "manifest", "checkpoint", "model")
    more = {"step": None, "protocol": {}, "pictures": 1, "captions": 1, "similarity": {}, "ranks": {}, "hardest": {}}
    gap = {"centroids": 0.5, "right": 0.25, "wrong": 0.125}
    return dict.fromkeys(names, "x") | more | {"gap": gap, "attention": [], "denoising": {"reason": "none"}} | values


def test_files_appear_at_once_and_replace_earlier_ones(tmp_path, monkeypatch):
    place = tmp_path / "inside" / "one"
    first = files.save_inside(place, result(tmp_path), {"attention-0.png": b"1", "attention-1.png": b"2"})
    assert files.load_inside(tmp_path) == [first]
    assert "centroids 0.500 apart" in files.format_inside(first)
    assert "denoising: none" in files.format_inside(first)
    curve = {name: [0.5] for name in ("ratio", "noised", "right", "other", "none")} | {"loss": "cosine"}
    second = files.save_inside(place, result(tmp_path, denoising={"image": curve}), {"attention-0.png": b"3"})
    assert files.load_inside(tmp_path) == [second]
    assert sorted(path.name for path in place.iterdir()) == ["attention-0.png", "inside.json"]
    assert "denoising of image tokens" in files.format_inside(second)
    monkeypatch.setattr(files.json, "dumps", None)
    with pytest.raises(TypeError):
        files.save_inside(place, result(tmp_path), {"attention-0.png": b"4"})
    monkeypatch.undo()
    assert files.load_inside(tmp_path) == [second], "a result that was not finished replaced an earlier one"
    assert [path.name for path in place.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "what": 1})])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "inside" / "x" / "inside.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"inside\.json is not a result"):
        files.load_inside(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        files.load_inside(tmp_path / "nowhere")


def test_command_writes_a_page_with_audio_that_loads_nothing(run, folder, capsys):
    """Without a checkpoint of the export's step there is no denoiser: the reason is said."""
    analyze.main(["inside", "--run", str(run), "--limit", "8"])
    (result,) = files.load_inside(run)
    assert (result.pictures, result.protocol["limit"]) == (8, 8)
    assert "step-00001234 cannot be used: progress.json is missing" in result.denoising["reason"]
    assert result.denoising["reason"] in capsys.readouterr().out
    page = (result.folder / "inside.html").read_text()
    assert page.count("data:audio/flac;base64,") >= len(result.attention) + HARDEST
    assert page.count("data:image/png;base64,") == len(result.attention) == 8
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    curve = {name: [0.5, 0.75] for name in ("ratio", "noised", "right", "other", "none")} | {"loss": "cosine"}
    write_page(replace(result, denoising={"image": curve}, attention={"reason": "<none>"}), Reader(load(folder)))
    page = (result.folder / "inside.html").read_text()
    assert "image tokens: cosine loss" in page
    assert "Not drawn: &lt;none&gt;" in page
    assert "wrong pairs</span>" in " ".join(page.split()), "a distribution has no last value"
    far = [one for one in result.hardest["speech_to_image"] if one["rank"] > FOUND]
    assert any(one["rank"] > FOUND + 1 for one in far), (
        "as the sixth one shown it would have the right number by chance"
    )
    assert all(f'alt="found as number {one["rank"]}, correct"' in page for one in far)
    (result.folder / "inside.html").unlink()
    (result.folder / "inside.html").mkdir()
    with pytest.raises(UserError, match=r"inside\.html cannot be written"):
        write_page(result, Reader(load(folder)))


def test_attention_of_a_matching_head_that_was_not_trained_is_not_drawn(run, folder):
    settled = settings(folder)
    settled.objectives.matching.weight = 0
    (run / "config.yaml").write_text(to_yaml(settled))
    analyze.main(["inside", "--run", str(run), "--limit", "3"])
    (result,) = files.load_inside(run)
    assert result.attention == {"reason": "the run trained no matching head (objectives.matching.weight 0)"}
    assert "Not drawn: the run trained no matching head" in (result.folder / "inside.html").read_text()
