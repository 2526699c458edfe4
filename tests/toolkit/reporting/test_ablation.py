"""Configurations over seeds against plain computations: means, deviations, and a permutation test of pictures."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from tests.toolkit.reporting.run_folders import write_result, write_run
from toolkit.reporting.ablation import ablations
from toolkit.reporting.runs import group_runs, load_runs


def grid(folder: Path, seeds: int = 3) -> Path:
    for name, weight, hits in (("a-whole", 0.2, 0.6), ("b-less", 0.0, 0.4)):
        for seed in range(seeds):
            write_run(folder / f"{name}_seed{seed}", seed, weight, hits=hits)
    return folder


def test_means_deviations_and_gains(tmp_path: Path) -> None:
    runs = load_runs([grid(tmp_path)])
    (table,) = ablations(group_runs(runs))

    def means(name: str, stage: str = "coarse") -> list[float]:
        return [run.final.report[stage]["mean_R@1"] for run in runs if run.final and run.name.startswith(name)]

    whole, less = means("a-whole"), means("b-less")
    row = dict(zip(("name", "seeds", "s2i", "i2s", "mean", "", "", "reranked"), table.recall[0], strict=True))
    assert (row["name"], row["seeds"]) == ("a-whole", "3")
    assert row["mean"] == f"{statistics.mean(whole):.1f} ± {statistics.stdev(whole):.1f}"
    names = [gain.name for gain in table.gains]
    assert names[:2] == ["re-ranking, a-whole", "re-ranking, b-less"]
    assert names[2:] == ["b-less against a-whole, coarse", "b-less against a-whole, re-ranked"]
    gain = table.gains[2]
    differences = [one - other for one, other in zip(less, whole, strict=True)]
    assert gain.difference == pytest.approx(statistics.mean(differences))
    assert gain.deviation == pytest.approx(statistics.stdev(differences))
    assert (gain.treatment, gain.control, gain.seeds) == (
        pytest.approx(statistics.mean(less)), pytest.approx(statistics.mean(whole)), 3
    )  # fmt: skip
    assert gain.p is not None
    assert gain.p < 0.01
    reranking = table.gains[0]
    assert reranking.difference == pytest.approx(statistics.mean(means("a-whole", "reranked")) - gain.control)
    assert not table.notes
    assert f"| b-less against a-whole, coarse | {gain.treatment:.1f} |" in table.markdown()


def test_the_test_is_clustered_by_picture_and_averages_the_seeds(tmp_path: Path) -> None:
    """All captions and the query of 8 pictures change together: the p is that of 8 coins, not of 24."""
    runs = load_runs([grid(tmp_path, seeds=1)])
    (table,) = ablations(group_runs(runs))
    results = [run.final.result for run in runs if run.final]
    added = []
    for result in results:
        assert result
        sums: dict[str, float] = {}
        for direction in ("speech_to_image", "image_to_speech"):
            ranks = result.ranks(direction, "coarse")
            for picture, ahead in zip(ranks.picture, ranks.ahead, strict=True):
                sums[picture] = sums.get(picture, 0.0) + 50.0 * (ahead == 0) / len(ranks.ahead)
        added.append([sums[picture] for picture in sorted(sums)])
    differences = np.array(added[1]) - np.array(added[0])
    assert table.gains[2].difference == pytest.approx(differences.sum())
    signs = np.random.default_rng(7).choice((-1, 1), (50_000, len(differences)))
    expected = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert table.gains[2].p == pytest.approx(expected, abs=0.01)
    assert any("Fewer than 3 seeds" in note for note in table.notes)


def test_different_test_data_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "one", denoising=0.2)
    write_run(tmp_path / "other", denoising=0.0, data="b" * 64)
    tables = ablations(group_runs(load_runs([tmp_path])))
    assert [[row[0] for row in table.recall] for table in tables] == [["one"], ["other"]]
    assert not [gain for table in tables for gain in table.gains if "against" in gain.name]
    assert any("baseline one was not evaluated" in note for note in tables[1].notes)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    grid(tmp_path)
    for path in (tmp_path / "b-less_seed2/results").iterdir():
        path.unlink()
    (tmp_path / "a-whole_seed1/recall.json").unlink()
    first, second = ablations(group_runs(load_runs([tmp_path])))
    assert "Not evaluated yet: a-whole_seed1." in first.notes
    assert "checksum not recorded" in second.data
    assert [row[1] for row in first.recall] == ["2", "2"]
    assert [row[1] for row in second.recall] == ["1"]
    assert second.gains[0].p is None
    assert any("toolkit/evaluate.py --run" in note for note in second.notes)


def test_other_queries_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "one", denoising=0.2)
    write_run(tmp_path / "other", denoising=0.0)
    monkeypatch.setattr("tests.toolkit.reporting.run_folders.PICTURES", 20)
    report = write_result(tmp_path / "other")
    (tmp_path / "other/recall.json").write_text(json.dumps(report))
    (table,) = ablations(group_runs(load_runs([tmp_path])))
    assert next(gain for gain in table.gains if "against" in gain.name).p is None


def test_the_baseline_is_the_first_or_named(tmp_path: Path) -> None:
    groups = group_runs(load_runs([grid(tmp_path)]))
    (table,) = ablations(groups, "b-less")
    assert [gain.name for gain in table.gains[2:]] == [f"a-whole against b-less, {s}" for s in ("coarse", "re-ranked")]
    with pytest.raises(UserError, match=r"--baseline nothing: there is no such .* a-whole, b-less"):
        ablations(groups, "nothing")


def test_different_protocols_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "one", denoising=0.2)
    protocol = {"rerank": 4, "fuse": "fitted", "max_seconds": 8.0, "image_size": 32, "resize": "crop"}
    write_run(tmp_path / "other", denoising=0.0, protocol=protocol)
    (table,) = ablations(group_runs(load_runs([tmp_path])))
    (note,) = [note for note in table.notes if "protocols differ" in note]
    assert "coarse, 60 s" in note
    assert "coarse, 8 s" in note
