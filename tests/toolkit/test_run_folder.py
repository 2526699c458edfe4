"""The run folder: one configuration per run."""

import pytest

from shards.errors import UserError
from toolkit import run_folder
from toolkit.config.load import load_config
from toolkit.config.schema import Config
from toolkit.run_folder import check_run, fingerprint, load_run, prepare_run, save_configuration


def changed(config, **values):
    for key, value in values.items():
        section = config
        *sections, last = key.split("__")
        for name in sections:
            section = getattr(section, name)
        setattr(section, last, value)
    return config


def test_run_folder_stores_its_configuration(tmp_path):
    run = tmp_path / "deep" / "run"
    config = load_config(["--run", str(run), "--training.stop_after", "5"])
    assert prepare_run(config) == run
    assert [path.name for path in run.iterdir()] == ["lease.json"], "training has not started successfully yet"
    save_configuration(config)
    saved = load_run(run)
    assert saved.training.stop_after is None
    assert saved == changed(config, training__stop_after=None)

    # The same command resumes the run, and so does the run folder alone, also after it was moved.
    prepare_run(load_config(["--run", str(run)]))
    moved = run.rename(tmp_path / "moved")
    assert load_config(["--run", str(moved)]) == changed(load_config(["--config", "quickstart"]), run=str(moved))


def test_run_folder_of_another_configuration(tmp_path):
    run = str(tmp_path / "run")
    prepare_run(load_config(["--run", run]))
    save_configuration(load_config(["--run", run]))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    free = [
        "--launch.nodes", "4", "--wandb.mode", "offline", "--evaluation.rerank", "3", "--final.rerank", "5",
        "--training.keep_checkpoints", "9", "--training.log_every", "1", "--data.workers", "0",
        "--training.zero_stage", "3", "--data.shards", "elsewhere",
    ]  # fmt: skip
    check_run(load_config(["--run", run, *free]))
    other = load_config(["--run", run, "--training.lr", "0.5", "--model.image.config.patch_size", "8"])
    same = fingerprint(load_config(["--run", run]))
    assert fingerprint(load_config(["--run", run, *free])) == same
    assert fingerprint(other) != same
    with pytest.raises(UserError) as error:
        prepare_run(other)
    assert str(error.value) == (
        f"{run} holds another run: model.image.config.patch_size 16 there, 8 here; training.lr 0.001 there, 0.5 here: "
        "name another folder with --run DIR"
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    prepare_run(load_config(["--run", run, *free]))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before, "training has not started successfully yet"
    save_configuration(load_config(["--run", run, *free]))
    assert load_run(run) == load_config(["--run", run, *free])


def test_resume_never_applies_to_one_start_only(tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    never = ["--run", run, "--training.resume", "never"]
    prepare_run(load_config(never))
    save_configuration(load_config(never))
    assert load_run(run).training.resume == "auto"
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"never: .*run/checkpoints holds checkpoints; name another folder"):
        prepare_run(load_config(never))
    prepare_run(load_config(["--run", run]))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="holds checkpoints"):
        prepare_run(load_config(never))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job has written the checkpoints itself
    prepare_run(load_config(never))


def test_run_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^run folder .*file/run cannot be written: Not a directory; name another with --run DIR$"
    ):
        prepare_run(changed(Config(), run=str(tmp_path / "file" / "run")))
    with pytest.raises(UserError, match=r"is not a run folder: no config\.yaml$"):
        load_run(tmp_path)


def test_augmentation_counts_only_where_it_is_not_the_default(monkeypatch):
    """Checkpoints from before the augmentation resume; one with it does not resume without it."""
    config = load_config(["--config", "quickstart"])
    with monkeypatch.context() as without:
        without.setattr(run_folder, "_MUTABLE_KEYS", (*run_folder._MUTABLE_KEYS, "data.augment."))
        before = fingerprint(config)
    assert fingerprint(config) == before
    changed(config, data__augment__speech__noise=0.5)
    noisy = fingerprint(config)
    changed(config, data__augment__speech__noise_snr=[0.0, 10.0])
    assert len({before, noisy, fingerprint(config)}) == 3


def test_runs_are_found_in_a_folder_and_in_its_grids_but_not_in_what_belongs_to_a_run(tmp_path):
    for name in ("b", "a", "grid/c", "grid/deep/d", "logs/e", "code/f", ".hidden", "grid/results"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "marked").touch()
    runs = run_folder.runs_below(tmp_path, lambda folder: (folder / "marked").exists())
    assert [str(run.relative_to(tmp_path)) for run in runs] == ["a", "b", "grid/c"]
