"""Submissions to SLURM and their dry runs, through the real command; SLURM's commands are stubs."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch import submit
from launch.preflight.checks import check_partition
from launch.record import newest
from launch.snapshot import ROOT
from shards.errors import UserError
from tests.launch.cluster import fake_slurm, job_spec, use_fake_slurm
from tests.test_whole_way import run as run_script
from tests.test_whole_way import write_config, write_table

GOLDEN = Path(__file__).parent / "golden"
REQUESTED = ("--nodes", "2", "--ranks-per-node", "2", "--gpus-per-node", "2", "--partition", "low", "--time", "10:00",
         "--account", "speech", "--qos", "normal", "--constraint", "a100&ib", "--cpus-per-rank", "3",
         "--name", "a name")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny configuration with its shards."""
    folder = tmp_path_factory.mktemp("preview")
    table = write_table(folder / "corpus", pictures=20)
    run_script("toolkit/make_shards.py", "table", "--root", str(table), "--out", str(folder / "shards"), "--jobs", "1")
    return write_config(folder / "tiny.yaml", folder / "shards")


@pytest.fixture
def slurm(tmp_path):
    """A run folder, and a function that runs the command with stubs of SLURM's."""
    environment = {**os.environ, **fake_slurm(tmp_path / "slurm")}

    def run(*arguments, code=0):
        command = [sys.executable, ROOT / "launch" / "submit.py", "--run", tmp_path / "run", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def script_of(output):
    return output[output.index("#!/bin/bash") : output.index("\n\nchecks:")]


def neutral(script, folder):
    """A script with placeholders for what differs from one machine or commit to the next."""
    script = script.replace(str(folder), "FOLDER").replace(sys.executable, "PYTHON")
    script = re.sub(r"(?<=/logs/)[\d-]+(?=[/\s])", "TIME", script)
    return re.sub(r"(?<=/code/)[0-9a-f]{12}", "HASH", script).rstrip("\n")


@pytest.mark.parametrize(("name", "more"), [("job", ()), ("array", ("--sweep", "seed=0,1,2", "--array", "2"))])
def test_the_script_is_the_recorded_one_and_the_one_that_is_submitted(slurm, config, tmp_path, name, more):
    shown = slurm("--config", config, *REQUESTED, *more, "--dry-run").stdout
    script = neutral(script_of(shown), tmp_path)
    golden = GOLDEN / f"{name}.sh"
    assert script == golden.read_text().rstrip("\n"), f"if this is meant, write it to {golden}:\n{script}"
    assert neutral((tmp_path / "slurm" / "tested").read_text(), tmp_path) == script
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"
    slurm("--config", config, *REQUESTED, *more, "--no-follow")
    assert neutral((tmp_path / "slurm" / "submitted").read_text(), tmp_path) == script


def test_the_dry_run_shows_resources_sizes_and_checks(slurm, config, tmp_path):
    shown = slurm("--config", config, *REQUESTED, "--dry-run").stdout
    for line in (
        "nodes: 2 x 2 = 4 ranks, 2 GPUs a node",
        "requested: partition low, account speech, qos normal, constraint a100&ib, time 10:00",
        "batch: 4 pairs = 1 pairs x 4 ranks x 1 micro-batches",
        "steps: 4",
        "steps per epoch: 3.00 of 4 pairs",
        "ok      partition: low is up",
        "ok      account: speech in SLURM's accounting",
        "ok      sbatch --test-only: Job 8 to start at",
    ):
        assert line in shown
    assert re.search(r"memory of a rank: \S+ [kM]B \(weights", shown)
    assert re.search(r"disk: up to \S+ MB \(4 checkpoints", shown)


def test_a_dry_run_lists_all_failed_checks(slurm, config):
    wrong = ("--nodes", "3", "--partition", "short", "--account", "nobody", "--training.batch_size", "4")
    shown = slurm("--config", config, "--ranks-per-node", "1", *wrong, "--dry-run", code=2).stdout
    failed = [line for line in shown.splitlines() if line.startswith("  FAILED")]
    assert [line.split()[1] for line in failed] == ["batch:", "partition:", "account:", "order:"]
    assert "allows at most 2 nodes a job" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--partition", "shrot"), "--partition shrot: SLURM has no such partition; there are broken, low, short"),
        (("--partition", "broken"), "partition broken is DOWN"),
        (("--partition", "short"), "partition short limits a job to 01:00:00, --time is 24:00:00"),
        (("--nodes", "6", "--training.batch_size", "12"), "partition low allows at most 5 nodes a job"),
        (("--account", "nobody"), "--account nobody: SLURM has no such account; there are root, speech"),
        (("--qos", "best"), "--qos best: SLURM has no such qos; there are normal"),
        (("--training.batch_size", "5"), "--training.batch_size 5 is not divisible"),
        (("--training.batch_size", "64"), "a batch of 64 needs at least"),
        (("--data.train", "tarin"), "tarin"),
        (("--final.split", "tset"), "no split 'tset'"),
        (("--model.image.trunk", "/no/where"), "model.image.trunk: no folder /no/where"),
        (("--model.speech.train", "9"), "model.speech.train: expected none, all or 1 to 2, got '9'"),
        (("--profile", "nosuch"), "profile nosuch: no such file or name"),
        (("--gpus-per-node", "a100"), "gpus_per_node is a100; expected a number of GPUs, or a type and a number such"),
        (("--sweep", "seed=0,x"), "seed"),
    ],
)
def test_an_error_comes_before_the_submission(slurm, config, tmp_path, wrong, message):
    ended = slurm("--config", config, *wrong, code=2)
    assert message in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "slurm" / "submitted").exists()


@pytest.mark.parametrize(("text", "option"), [
    ("gpus_per_node: 4", "gpus-per-node=4"),
    ("gpus_per_node: a100:4", "gpus-per-node=a100:4"),
    ('sbatch: {gres: "gpu:a100:4"}', "gres=gpu:a100:4"),
    ("sbatch: {G: 4}", "gpus=4"),
])  # fmt: skip
def test_a_rank_for_each_gpu_however_it_is_requested(slurm, config, tmp_path, text, option):
    profile = tmp_path / "gpus.yaml"
    profile.write_text(text)
    command = ("--config", config, "--training.batch_size", "4", "--profile", profile, "--dry-run")
    shown = slurm(*command).stdout
    kind = " (a100)" if "a100" in option else ""
    assert f"nodes: 1 x 4 = 4 ranks, 4 GPUs a node{kind}\n" in shown
    assert f"#SBATCH --{option}\n" in shown
    assert len(re.findall("#SBATCH --g", shown)) == 1
    assert "ok      GPUs: 4 for 4 ranks a node\n" in shown
    fewer = slurm(*command, "--ranks-per-node", "2").stdout
    assert "ok      GPUs: 4 for 2 ranks a node, 2 of them idle: --ranks-per-node 0 gives each a rank\n" in fewer
    assert "2 ranks, 2 GPUs a node" in slurm(*command, "--gpus-per-node", "2").stdout
    more = slurm(*command, "--ranks-per-node", "8", "--training.batch_size", "8", code=2).stdout
    assert "FAILED  GPUs: 8 ranks a node cannot share 4 GPUs" in more


def test_the_gpus_option_is_refused_for_several_nodes(slurm, config, tmp_path):
    profile = tmp_path / "gpus.yaml"
    profile.write_text("sbatch: {gpus: 4}")
    ended = slurm("--config", config, "--profile", profile, "--nodes", "2", "--no-follow", code=2)
    assert "sbatch.gpus of the profile gpus counts all GPUs of a job" in ended.stderr
    assert "set gpus_per_node instead" in ended.stderr


@pytest.mark.parametrize("more", [(), ("--sweep", "seed=1,2")])
def test_the_number_of_a_job_is_found_beside_a_greeting(slurm, config, tmp_path, more):
    sbatch = tmp_path / "slurm" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("Submitted", "You have 3 jobs: job 12 waits.\nSubmitted"))
    assert "job 7 (slurm): 2 " in slurm("--config", config, *more, "--no-follow").stdout
    assert newest(tmp_path / "run").submission.job == "7"


def test_an_answer_without_a_number(slurm, config, tmp_path):
    sbatch = tmp_path / "slurm" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("Submitted batch job 7", "See you"))
    ended = slurm("--config", config, "--no-follow", code=2)
    assert ended.stderr == (
        "error: sbatch's answer (See you) names no job; if squeue --me shows it, end it with scancel\n"
    )


def test_deepspeed_validates_its_section(slurm, config, tmp_path):
    ended = slurm("--config", config, "--deepspeed.zero_optimisation.stage", "2", code=2)
    assert ended.stderr.startswith("error: deepspeed.zero_optimisation: unknown key"), ended.stderr
    assert not (tmp_path / "slurm" / "submitted").exists()


def test_shards_of_another_size_are_reported(slurm, config, tmp_path):
    shards = Path(re.search(r"shards: (\S+)", config.read_text())[1])
    victim = next(shards.glob("train-*.tar"))
    content = victim.read_bytes()
    try:
        victim.write_bytes(content[:-512])
        assert f"{victim.name} has {len(content) - 512:,} bytes, not " in slurm("--config", config, code=2).stderr
        victim.unlink()
        assert "No such file or directory, though the manifest lists it" in slurm("--config", config, code=2).stderr
    finally:
        victim.write_bytes(content)


def test_a_full_disk_and_a_folder_that_cannot_be_written(config, tmp_path, monkeypatch):
    from launch.preflight.checks import check_folder
    from toolkit.config.load import load_config

    there = load_config(["--config", str(config), "--run", str(tmp_path / "run")])
    assert "can be written" in check_folder(there, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(UserError, match=r"has 0\.0 GB free, the run may take"):
        check_folder(there, 2)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(there, 2)


def test_one_of_several_partitions_is_enough(tmp_path, monkeypatch):
    use_fake_slurm(monkeypatch, tmp_path / "slurm")
    assert check_partition(job_spec(partition="broken,low")).startswith("low is up")
    assert check_partition(job_spec()).startswith("low is up"), "the default one"
    (tmp_path / "slurm" / "partitions").write_text("PartitionName=only Default=NO State=UP\n")
    with pytest.raises(UserError, match="no default partition: set --partition to one of only"):
        check_partition(job_spec())


def test_a_submission_is_recorded_without_heavy_imports(config, tmp_path):
    """In one process, to see what it imports; its processor time, since the machine may have other work."""
    code = textwrap.dedent("""
        import sys, time
        from launch.submit import main
        try:
            main(sys.argv[1:])
        except SystemExit as end:
            assert not end.code, end.code
        heavy = {"torch", "transformers", "deepspeed"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else time.process_time() > 2 and "too slow")
    """)
    arguments = ["--config", str(config), "--run", str(tmp_path / "run"), "--nodes", "2", "--no-follow"]
    environment = {**os.environ, **fake_slurm(tmp_path / "slurm")}
    began = time.time()
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    there = newest(tmp_path / "run")
    assert there is not None
    record = there.submission
    assert (record.job, record.cluster, record.nodes, record.ranks) == ("7", "slurm", 2, 4)
    assert record.command == arguments
    assert (Path(record.code) / "launch" / "node.py").is_file()
    assert record.time >= began
    assert "nodes: 2" in (there.folder / "config.yaml").read_text()


def test_a_grid_is_one_array_with_a_folder_for_each_member(slurm, config, tmp_path):
    output = slurm("--config", config, "--sweep", "seed=3,4", "--array", "1", "--nodes", "2", "--no-follow").stdout
    assert "job 7 (slurm): 2 members, 1 at a time, 4 ranks each" in output
    array = newest(tmp_path / "run")
    members = json.loads((array.folder / "members.json").read_text())
    assert members == array.submission.members
    for index, seed in (("0", 3), ("1", 4)):
        own = Path(members[index])
        assert f"seed: {seed}\n" in (own / "config.yaml").read_text()
        record = newest(own.parent.parent).submission
        assert (record.job, record.index, record.logs) == ("7", index, str(array.folder))
        assert record.code == array.submission.code
    assert len(list(array.folder.glob("7_*_submitted.pkl"))) == 2


def test_an_invalid_member_stops_the_grid(slurm, config, tmp_path):
    ended = slurm("--config", config, "--sweep", "training.batch_size=4,6", "--nodes", "2", code=2)
    assert "--training.batch_size 6 is not divisible" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_checks_that_members_share_run_once(slurm, config, tmp_path):
    shown = slurm("--config", config, "--sweep", "seed=3,4,5", "--qos", "normal", "--nodes", "2", "--dry-run").stdout
    checks = re.findall(r"^  (?:ok     |FAILED ) (?:seed\d: )?([^:]+):", shown, re.MULTILINE)
    counts = {name: checks.count(name) for name in checks}
    assert counts.pop("run folder") == 3
    assert counts.pop("order") == 3, "it depends on the seed"
    assert set(counts) >= {"partition", "qos", "batch", "model", "shards", "earlier jobs"}
    assert set(counts.values()) == {1}


def test_a_second_job_of_the_run_is_refused(slurm, config, tmp_path):
    slurm("--config", config, "--nodes", "2", "--no-follow")
    (tmp_path / "slurm" / "squeue").write_text("#!/bin/sh\necho '7|PENDING|Priority'\n")
    ended = slurm("--config", config, "--nodes", "2", "--no-follow", code=2)
    assert "run: job 7 is waiting: python launch/runs.py cancel" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert re.search(r"FAILED +earlier jobs: .*job 7 is waiting", slurm("--config", config, "--dry-run", code=2).stdout)


def test_the_profile_is_applied(slurm, config, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "partition: short\ntime: 30\nsetup: [module load cuda]\nenv: {A: b}\nscratch: $TMPDIR\nsbatch: {mem: 3G}"
    )
    shown = slurm("--config", config, "--profile", profile, "--time", "20", "--dry-run").stdout
    for line in ("--partition=short", "--time=20", "--mem=3G", "\nmodule load cuda\n", "\nexport A=b\n"):
        assert line in script_of(shown)
    slurm("--config", config, "--profile", profile, "--no-follow")
    assert "cache: $TMPDIR" in (newest(tmp_path / "run").folder / "config.yaml").read_text()


def test_members_run_one_after_another_on_this_machine(config, tmp_path, monkeypatch, capsys):
    ran = []

    def run_one(spec, command, code, member):
        assert member, "resume has to know it"
        assert spec.config.launch.follow, "the next one waits for this"
        ran.append((Path(spec.config.run).name, code))
        Path(spec.config.run).mkdir()
        (Path(spec.config.run) / "config.yaml").touch()
        return 3 if len(ran) == 1 else 0

    monkeypatch.setattr(submit, "run_one", run_one)
    with pytest.raises(SystemExit) as end:
        submit.main(["--config", str(config), "--run", str(tmp_path), "--cluster", "local", "--sweep", "seed=1,2",
                     "--ranks-per-node", "1", "--no-follow"])  # fmt: skip
    assert end.value.code == 1, "a failure of the first is not lost"
    assert [name for name, _ in ran] == ["seed1", "seed2"]
    assert ran[0][1] == ran[1][1]


def test_debug_runs_in_this_process(config, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(submit, "train_and_evaluate", lambda file: trained.append((os.getpid(), file)))
    with pytest.raises(SystemExit) as end:
        submit.main(["--config", str(config), "--run", str(tmp_path / "run"), "--cluster", "debug"])
    assert end.value.code == 0
    ((pid, file),) = trained
    assert pid == os.getpid()
    assert Path(file).is_file()
    assert not list((tmp_path / "run").rglob("submission.json"))
