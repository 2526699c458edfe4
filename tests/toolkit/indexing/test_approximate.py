"""Approximate search: exact scores of what it finds, recall as measured, atomic, rebuilt or ignored when stale."""

import builtins
import json
import shutil

import numpy as np
import pytest
import torch

from shards.errors import UserError
from tests.toolkit.indexing.write_index import write_index
from tests.toolkit.indexing_files import EXPORT, save_audio, save_image, save_images
from toolkit import search as command
from toolkit.indexing import approximate
from toolkit.indexing.approximate import open_approximate, refresh
from toolkit.indexing.items import FileSource
from toolkit.indexing.nearest import nearest
from toolkit.indexing.store import Index
from toolkit.indexing.update import update

pytest.importorskip("faiss")


def clustered(count, dim=16, clusters=40, seed=0):
    chance = np.random.default_rng(seed)
    points = chance.standard_normal((clusters, dim))[chance.integers(0, clusters, count)]
    points = points + 0.5 * chance.standard_normal((count, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    index = write_index(tmp_path_factory.mktemp("approximate") / "index", clustered(3000))
    assert refresh(index, 3001) is None
    return index, refresh(index, 3000)


def test_recall_is_that_of_a_naive_comparison(built):
    index, measured = built
    assert (measured.lists, measured.sample) == (110, 256)
    assert 1 < measured.probes < 110
    result = open_approximate(index)
    values = index.embeddings.astype(np.float64)
    hits = total = 0
    for row in np.sort(np.random.default_rng(1).choice(3000, 256, replace=False)):
        query = index.embeddings[row].astype(np.float32)
        scores = values @ query
        best = [other for other in np.argsort(-scores, kind="stable")[:11] if other != row]
        got = result.nearest(torch.from_numpy(query)[None], 11)[1][0].tolist()
        hits, total = hits + len(set(best) & set(got)), total + len(best)
    assert measured.recall == pytest.approx(hits / total, abs=2e-3)
    assert measured.recall >= 0.99


def test_all_lists_give_the_exact_result(built):
    index, measured = built
    queries = torch.from_numpy(clustered(20, seed=5))
    scores, rows = open_approximate(index).nearest(queries, 7, probes=measured.lists)
    exact_scores, exact_rows = nearest(index, queries, 7)
    assert rows.equal(exact_rows)
    torch.testing.assert_close(scores, exact_scores)
    one = open_approximate(index).nearest(queries, 7, probes=1)
    assert not one[1].equal(exact_rows)  # few lists miss some
    for query, values, places in zip(queries, *one, strict=True):
        expected = torch.from_numpy(index.embeddings[places.numpy()].astype(np.float32)) @ query
        torch.testing.assert_close(values, expected)


def test_as_many_results_as_wanted(built):
    index, _ = built
    query = torch.from_numpy(clustered(1, seed=6))
    for k in (1, 500, 3000, 5000):
        rows = open_approximate(index).nearest(query, k, probes=1)[1][0]
        assert len(rows) == len(set(rows.tolist())) == min(k, 3000)
    assert open_approximate(index).nearest(query[:0], 5)[1].shape == (0, 5)


def test_equal_and_not_finite_embeddings(tmp_path):
    embeddings = clustered(300)
    embeddings[5] = np.nan
    embeddings[200] = embeddings[100]
    index = write_index(tmp_path / "index", embeddings)
    refresh(index, 1)
    rows = open_approximate(index).nearest(torch.from_numpy(embeddings[100])[None], 300)[1][0].tolist()
    assert rows[:2] == [100, 200]
    assert rows[-1] == 5


@pytest.mark.parametrize("count", [1, 2, 12])
def test_small_indexes(tmp_path, count):
    index = write_index(tmp_path / "index", clustered(count))
    assert refresh(index, 1).recall >= 0.99 or count == 1
    assert len(open_approximate(index).nearest(torch.ones(1, 16), 10)[1][0]) == min(count, 10)


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", clustered(400))

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(approximate, "_measure", fail)
        with pytest.raises(KeyboardInterrupt):
            refresh(index, 1)
    assert open_approximate(index) is None
    assert refresh(index, 1).lists == 40
    assert [path.name for path in index.folder.glob("approximate-*")] == [index.head.approximate_name]


def test_without_faiss_search_is_exact_and_says_so(tmp_path, monkeypatch, caplog):
    index = write_index(tmp_path / "index", clustered(50))
    real = builtins.__import__

    def missing(name, *rest):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert refresh(index, 1) is None
    assert "pip install 'speech-image-toolkit[index]'" in caplog.text


def damage_rows(folder):
    rows = np.load(folder / "rows.npy")
    rows[:] = 10**6
    np.save(folder / "rows.npy", rows)


@pytest.mark.parametrize(
    "damage",
    [
        damage_rows,
        lambda folder: (folder / "approximate.json").unlink(),
        lambda folder: (folder / "approximate.json").write_text("[" * 10_000),
        lambda folder: (folder / "approximate.json").write_text('{"format": 1, "lists": 1000000000, "probes": 1}'),
        lambda folder: (folder / "approximate.json").write_text(
            '{"format": 1, "lists": 1000000000, "probes": 1, "recall": 1.0, "sample": 1}'
        ),
        lambda folder: (folder / "rows.npy").unlink(),
        lambda folder: (folder / "rows.npy").write_bytes(b"\x93NUMPY"),
        lambda folder: np.save(folder / "bounds.npy", np.full(41, 7)),
        lambda folder: np.save(folder / "centroids.npy", np.array([{}], dtype=object)),
        lambda folder: np.save(folder / "embeddings.npy", np.zeros((400, 16))),
    ],
)
def test_damage_is_one_line(tmp_path, damage):
    index = write_index(tmp_path / "index", clustered(400))
    refresh(index, 1)
    damage(index.folder / index.head.approximate_name)
    with pytest.raises(UserError, match=r"damaged .*(--exact|index again)") as caught:
        open_approximate(index).nearest(torch.ones(1, 16), 5)
    assert "\n" not in str(caught.value)
    if damage is not damage_rows:  # which is noticed where they are read
        assert refresh(index, 1).lists == 40
        assert len(open_approximate(index).nearest(torch.ones(1, 16), 5)[1][0]) == 5


def test_commands_build_use_and_renew_it(tmp_path, capsys, caplog):
    pictures, out = save_images(tmp_path / "pictures", 20), tmp_path / "index"
    source = FileSource(str(pictures), "image")
    query = str(save_audio(tmp_path / "query.wav", 1))
    with caplog.at_level("INFO", "toolkit"):
        update(out, source, EXPORT, device="cpu", approximate_from=20)
    assert "recall@10 of" in caplog.text

    def search(*options):
        capsys.readouterr()
        caplog.clear()
        command.main([str(out), query, "--json", "--device", "cpu", *options])
        return [hit["row"] for hit in json.loads(capsys.readouterr().out)["results"]]

    result = search()
    assert "--exact searches all" in caplog.text
    exact = search("--exact")
    assert "approximate" not in caplog.text
    assert len(set(result) & set(exact)) >= 5

    stale = out / Index.open(out).head.approximate_name
    kept = shutil.copytree(stale, tmp_path / "kept")
    save_image(pictures / "new.png", 50)
    update(out, source, EXPORT, device="cpu", approximate_from=20)
    renewed = Index.open(out).head.approximate_name
    assert [path.name for path in out.glob("approximate-*")] == [renewed] != [stale.name]
    assert len(open_approximate(Index.open(out)).rows) == 21

    shutil.rmtree(out / renewed)
    shutil.copytree(kept, stale)  # as if the update had been killed before it was renewed
    assert search() == search("--exact")
    search()
    assert "of another state and is not used" in caplog.text
    update(out, source, EXPORT, device="cpu", approximate_from=22)
    assert not list(out.glob("approximate-*"))
