import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.manifest import load
from shards.reading.dry_run import plan_reading
from shards.reading.order import order_of
from tests.shards.checking import damage
from toolkit import train
from toolkit.train import main

ROOT = Path(__file__).parents[2]


def arguments(folder: Path, run: Path, **more: object) -> list[str]:
    pairs = {
        "config": "quickstart",
        "run": run,
        "data.shards": folder,
        "training.batch_size": 2,
        "data.shuffle_shards": 2,
    }
    return [str(word) for name, value in {**pairs, **more}.items() for word in (f"--{name}", value)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return damage.write(tmp_path / "shards")


def test_prints_the_plan_of_the_configuration_and_builds_nothing(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from toolkit.train import main; main(sys.argv[1:]);"
        "print(*{'torch', 'transformers', 'deepspeed'} & sys.modules.keys())"
    )
    words = arguments(folder, tmp_path / "run", **{"data.workers": 3, "model.speech.groups": 2, "seed": 5})
    command = [sys.executable, "-c", code, *words, "--dry-run", "--ranks", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    m = load(folder)
    expected = plan_reading(order_of(m, "train", 2, 5, 2), [m], 2, 3, 1, 2, 4.0).text()
    assert done.stdout == f"{expected}\n\n"
    assert not (tmp_path / "run").exists()


def test_number_of_ranks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks(*more: str, **keys: object) -> str:
        main([*arguments(folder, tmp_path / "run", **keys), "--dry-run", *more])
        return capsys.readouterr().out

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "(1 rank x " in ranks()
    assert "(2 ranks x " in ranks(**{"launch.nodes": 2})
    assert "each of 2 nodes" in ranks(**{"launch.nodes": 2})
    assert "(2 ranks x " in ranks(**{"launch.ranks_per_node": 2})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "(2 ranks x " in ranks()
    assert "(1 rank x " in ranks("--ranks", "1")
    assert "each of 1 node:" in ranks("--ranks", "1", **{"launch.nodes": 2})


def test_pictures_that_two_data_sets_of_a_mixture_share_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = damage.write(tmp_path / "other")
    shared = len(load(folder).rows("train"))
    main([*arguments(folder, tmp_path / "run", **{"data.mixture": f"{{{folder}: 1, {other}: 1}}"}), "--dry-run"])
    told = capsys.readouterr().err
    assert f"warning: {shared} image ids of train are in {folder} and in {other}" in told
    main([*arguments(folder, tmp_path / "run"), "--dry-run"])
    assert "image ids" not in capsys.readouterr().err


def test_without_evaluation_no_dev_is_needed(folder: Path, tmp_path: Path) -> None:
    config, _ = train.parse(arguments(folder, tmp_path, **{"data.dev": "val", "evaluation.every": 0}), train.Parser())
    assert train.dry_run(config, 1)


def test_mixture_and_lanes(folder: Path, tmp_path: Path) -> None:
    other = damage.write(tmp_path / "other")
    keys = {"data.mixture": f"{{{folder}: 1, {other}: 1}}", "data.shard_groups": 1}
    config, _ = train.parse(arguments(folder, tmp_path / "run", **keys), train.Parser())
    text = train.dry_run(config, 1)
    assert text.count("50.0% of each batch") == 2
    assert "other/train-0000" in text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--ranks", "2"], "--ranks is an option of --dry-run"),
        (["--dry-run", "--ranks", "0"], "--ranks is 0; expected 1 or more"),
        (["--dry-run", "--ranks", "two"], "--ranks"),
        (["--dry-run", "--ranks", "3"], "--training.batch_size 2 is not divisible"),
        (["--dry-run", "--data.shards", "/no/where"], "no shards in /no/where"),
        (["--dry-run", "--data.dev", "val"], "no split 'val' in .*: it has train, dev, test"),
        (["--data.dev", "val"], "no split 'val' in .*: it has train, dev, test"),
        (["--dry-run", "--training.batch_size", "90"], "set --training.batch_size to 3 or less"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], reason: str) -> None:
    monkeypatch.setattr("toolkit.distributed.init_distributed", lambda: (0, 1, None))
    with pytest.raises(UserError, match=reason) as caught:
        main([*arguments(folder, tmp_path / "run"), *more])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
