"""Stored results: names, what is replaced and what is not, damaged and hostile files."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from shards.errors import UserError
from tests.toolkit.evaluation.made_results import CAPTIONS, made, ranks
from toolkit.evaluation.results import format_results, load_results


def test_ranks_and_report_are_read_as_they_were_saved(tmp_path):
    saved = made(tmp_path / "results", 20, seed=3)
    (loaded,) = load_results(tmp_path)
    assert loaded == saved
    assert load_results(tmp_path / "results") == load_results(saved.path) == [saved]
    for direction, expected in ranks(20, seed=3).items():
        found = loaded.ranks(direction)
        for name, values in vars(expected).items():
            assert getattr(found, name).tolist() == values.tolist()
    assert loaded.ranks("speech_to_image").query[CAPTIONS].endswith("p001#0")


def test_results_that_differ_in_anything_stand_beside_one_another(tmp_path):
    protocol = {"rerank": 16, "fuse": "sum", "max_seconds": 60.0, "image_size": 32, "resize": "crop"}
    changes = [
        {}, {"corpus": "other"}, {"split": "dev"}, {"manifest": "cd" * 32}, {"checkpoint": "last"}, {"step": 8},
        {"step": None}, {"protocol": protocol}, {"protocol": protocol | {"rerank": 17}},
        {"protocol": protocol | {"fuse": "matching"}}, {"protocol": protocol | {"max_seconds": 60.5}},
        {"protocol": protocol | {"image_size": 33}}, {"protocol": protocol | {"resize": "squash"}},
        {"checkpoint": "x" * 300}, {"checkpoint": "x" * 299 + "y"}, {"checkpoint": "../../outside"}, {"corpus": "a/b"},
    ]  # fmt: skip
    for change in changes:
        made(tmp_path / "results", 5, **change)
    assert len(load_results(tmp_path)) == len(changes)
    assert len(list((tmp_path / "results").iterdir())) == 2 * len(changes)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    made(tmp_path / "results", 5, seed=1, time=2.0)
    assert len(load_results(tmp_path)) == len(changes), "the same evaluation replaces its own result"
    assert load_results(tmp_path)[-1].time == 2.0


def test_groups_are_kept_while_the_ranks_are_the_same(tmp_path):
    made(tmp_path / "results", 5, groups={"speaker": {"a": 1}, "words": {"b": 2}})
    made(tmp_path / "results", 5, groups={"words": {"c": 3}})
    assert made(tmp_path / "results", 5).report["groups"] == {"speaker": {"a": 1}, "words": {"c": 3}}
    assert load_results(tmp_path)[0].report["groups"] == {"speaker": {"a": 1}, "words": {"c": 3}}
    assert made(tmp_path / "results", 5, seed=1).report["groups"] is None


def test_an_interrupted_pair_of_files_is_noticed(tmp_path):
    result = made(tmp_path / "results", 5, seed=0)
    mine = result.path.with_suffix(".npz").read_bytes()
    made(tmp_path / "results", 5, seed=1)
    result.path.with_suffix(".npz").write_bytes(mine)
    with pytest.raises(UserError, match=r"does not belong to .*: repeat this evaluation"):
        load_results(tmp_path)[0].ranks("speech_to_image")
    result.path.with_suffix(".npz").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file or directory; repeat this evaluation"):
        load_results(tmp_path)[0].ranks("speech_to_image")


def stored(tmp_path, write):
    """A result whose ranks are another file, with the checksum to it."""
    result = made(tmp_path / "results", 5)
    write(result.path.with_suffix(".npz"))
    digest = hashlib.sha256(result.path.with_suffix(".npz").read_bytes()).hexdigest()
    result.path.write_text(json.dumps(result.report | {"ranks_sha256": digest}))
    return load_results(tmp_path)[0]


def pickled(path):
    np.savez(path, image_id=np.array([{"a": 1}], dtype=object))


def compressed(path):
    np.savez_compressed(path, image_id=np.zeros(10_000_000, "S1"))


def missing(path):
    np.savez(path, image_id=np.zeros(3, "S1"))


def torn(path):
    path.write_bytes(path.read_bytes()[:100])


def no_archive(path):
    np.save(path.open("wb"), np.zeros(3))


def foreign_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../image_id.npy", b"nothing")


@pytest.mark.parametrize("write", [pickled, compressed, missing, torn, no_archive, foreign_member])
def test_hostile_ranks_are_one_line(tmp_path, write):
    with pytest.raises(UserError, match=r"npz is damaged .*: repeat this evaluation") as caught:
        stored(tmp_path, write).ranks("speech_to_image")
    assert "\n" not in str(caught.value)


def test_compressed_ranks_are_refused_though_nothing_is_missing(tmp_path):
    """They could fill the memory."""

    def compress(path):
        with np.load(path) as stored:
            columns = dict(stored)
        np.savez_compressed(path, **columns)

    with pytest.raises(UserError, match="a column is compressed"):
        stored(tmp_path, compress).ranks("speech_to_image")


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 100_000, '{"run": 1}', "null"])
def test_foreign_json_is_one_line(tmp_path, content):
    made(tmp_path / "results", 5)
    (tmp_path / "results" / "foreign.json").write_text(content)
    with pytest.raises(UserError, match=r"foreign.json is not the result of an evaluation"):
        load_results(tmp_path)


def test_a_folder_without_results_and_none(tmp_path):
    assert load_results(tmp_path) == []
    with pytest.raises(UserError, match="no such folder"):
        load_results(tmp_path / "nowhere")


def test_the_table_has_a_line_for_each_stage(tmp_path):
    plain = made(tmp_path, 5)
    protocol = plain.protocol | {"rerank": 16, "fuse": "sum"}
    bounds = {"coarse": {"mean_R@1": [7.0, 13.0]}, "reranked": {"mean_R@1": [8.0, 14.5]}}
    other = made(
        tmp_path,
        5,
        run="other",
        protocol=protocol,
        reranked=plain.report["coarse"] | {"mean_R@1": 11.2},
        intervals=bounds,
    )
    lines = format_results([plain, other]).splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:4] == ["run", "data", "checkpoint", "protocol"]
    assert lines[1].split()[-1] == "10.0"
    assert "7.0 to 13.0" in lines[2]
    assert "best 16 by sum" in lines[3]
    assert lines[3].endswith("11.2  8.0 to 14.5")
