"""A whole evaluation: the same on any number of ranks; names of checkpoints; where protocols cut the audio."""

import numpy as np
import pytest
import torch

from shards.manifest import load
from tests.distributed import run_ranks
from tests.toolkit.evaluation.test_retrieve import CPU, random_model, settings
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.evaluation import Checkpoint, audio_limits, checkpoint_name, evaluate_split
from toolkit.evaluation.results import DIRECTIONS, ranks_of
from toolkit.evaluation.retrieve import retrieve


def evaluated(rank, world_size, folder):
    torch.set_num_threads(1)
    manifest, checkpoint = load(folder), Checkpoint(random_model(), "run", "best", 3)
    groups = {"duration": ["long" if seconds > 0.8 else "short" for seconds in manifest.duration[-25:]]}
    groups["duration"] = groups["duration"][: sum(len(manifest.captions(s)) for s in manifest.rows("test"))]
    process = ProcessInfo(rank, world_size, CPU)
    found = evaluate_split(checkpoint, manifest, "test", settings(folder), 4, process, groups, ["sum", "matching"])
    for each in found:
        del each.report["time"], each.report["reranked"]["seconds_per_query"]
    return [(each.report, {name: column.tolist() for name, column in each.columns.items()}) for each in found]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_is_equal_on_any_number_of_ranks(folder, world_size):
    threads = torch.get_num_threads()
    alone = evaluated(0, 1, folder)
    torch.set_num_threads(threads)
    first, *others = run_ranks(evaluated, world_size, folder)
    assert first == alone
    assert others == [[]] * (world_size - 1)
    assert [report["protocol"]["fuse"] for report, _ in alone] == ["sum", "matching"]


def test_scores_of_reranking_share_encodings_and_equal_separate_evaluations(folder):
    manifest, model, calls = load(folder), random_model(), []
    inner = model.encode_speech
    model.encode_speech = lambda *inputs: calls.append(1) or inner(*inputs)
    process = ProcessInfo(0, 1, CPU)
    found = evaluate_split(
        Checkpoint(model, "run", "best", 3), manifest, "test", settings(folder), 4, process, fuses=["sum", "matching"]
    )
    together = len(calls)
    for each, fuse in zip(found, ("sum", "matching"), strict=True):
        report = retrieve(model, manifest, "test", settings(folder, fuse), 4, process).report
        for key in ("coarse", "reranked", "twins"):
            timed = {"seconds_per_query": 0}
            assert each.report[key] | timed == report[key] | timed
    assert len(calls) == 3 * together


def test_stored_ranks_name_their_queries(folder):
    manifest = load(folder)
    (found,) = evaluate_split(
        Checkpoint(random_model(), "run", "best", 3), manifest, "test", settings(folder), 0, ProcessInfo(0, 1, CPU)
    )
    by_speech, by_image = (ranks_of(found.columns, direction, "coarse") for direction in DIRECTIONS)
    pictures = [f"test{number}" for number in range(13)]
    assert by_image.query.tolist() == pictures
    assert by_speech.query.tolist() == [
        f"{name}#{n}" for number, name in enumerate(pictures) for n in range(1 + number % 3)
    ]
    assert by_speech.picture.tolist() == [query.partition("#")[0] for query in by_speech.query]
    assert found.retrieval.speech_to_image.rank_counts.ahead.tolist() == by_speech.ahead.tolist()
    assert all(column.dtype.kind in "iS" for column in found.columns.values())


def test_exports_outside_of_the_run_have_names_of_their_own(tmp_path):
    paths = [tmp_path / place for place in ("a/export/best", "a/export/last", "b/export/best", "best")]
    for path in paths:
        path.mkdir(parents=True)
    names = [checkpoint_name(path, tmp_path / "a") for path in paths]
    assert names[:2] == ["best", "last"]
    assert len(set(names)) == 4
    assert all(name.startswith("best-") for name in names[2:])
    assert checkpoint_name(paths[0], None) != "best"


def test_protocols_cut_audio_where_that_makes_a_difference(folder):
    manifest = load(folder)
    rows = [row for sample in manifest.rows("test") for row in manifest.captions(int(sample))]
    longest = float(manifest.duration[rows].max())
    assert audio_limits(manifest, "test", 60.0) == [60.0]
    assert audio_limits(manifest, "test", 1.0) == [float(np.ceil(longest)), 1.0]
    manifest.duration[rows[0]] = 20.5
    assert audio_limits(manifest, "test", 8.0) == [21.0, 10.0, 8.0]
    assert audio_limits(manifest, "test", 10.0) == [21.0, 10.0]
    assert audio_limits(manifest, "test", 60.0) == [60.0, 10.0]
