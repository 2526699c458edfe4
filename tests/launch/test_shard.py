"""Sharding by parts: here one after another, and what SLURM is given, in whose place commands run it at once."""

import os
import re
from pathlib import Path

import pytest

from launch import shard
from shards.errors import UserError
from shards.manifest import load
from tests.launch.cluster import write_commands
from tests.test_whole_way import write_table

# sbatch that runs a script, or an array's parts in turn; a job with a dependency only if all parts ended well.
SBATCH = """
for last; do :; done
number=$(cat {folder}/number); echo $((number + 1)) > {folder}/number
array=$(sed -n 's/^#SBATCH --array=\\([0-9]*\\)-\\([0-9]*\\).*/\\1 \\2/p' $last)
log=$(sed -n 's/^#SBATCH --output=//p' $last)
bad=$(cat {folder}/bad 2>/dev/null)
if [ -n "$array" ]; then
    for part in $(seq $array); do
        SLURM_ARRAY_TASK_ID=$part bash $last > $(echo $log | sed s/%a/$part/) 2>&1 || echo $part >> {folder}/bad
    done
elif [ -z "$bad" ]; then bash $last > $log 2>&1; fi
echo You have 3 jobs, job 12 waits
echo "$number;cluster"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands named as SLURM's: jobs run while they are submitted."""
    folder = tmp_path / "bin"
    others = dict.fromkeys(("srun", "squeue", "scontrol", "sacct", "scancel"), "exit 0")
    write_commands(folder, {**others, "sbatch": SBATCH.format(folder=folder)})
    (folder / "number").write_text("40")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(shard, "_FILE_DELAY", 0.0)
    monkeypatch.setattr(shard, "_POLL_INTERVAL", 0.01)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("shard") / "corpus", pictures=10)


def words(corpus, out, *more):
    given = ("table", "--root", corpus, "--out", out, "--jobs", "1", "--samples-per-shard", "2", "--parts", "2", *more)
    return list(map(str, given))


def main(*arguments):
    with pytest.raises(SystemExit) as ended:
        shard.main(list(arguments))
    return ended.value.code


def test_on_this_machine_parts_are_written_one_after_another(tmp_path, corpus, capfd):
    out = tmp_path / "out"
    assert main(*words(corpus, out, "--cluster", "local")) == 0
    output = capfd.readouterr().out
    assert "part 1/2" in output
    assert "part 2/2" in output
    assert load(out).corpus == "table"
    assert sum(each.samples for each in load(out).shards) == 10
    assert main(*words(corpus, out, "--cluster", "local")) == 0
    assert "finished already" in capfd.readouterr().out


def test_a_failed_part_ends_the_command(tmp_path, corpus, capfd):
    broken = corpus.with_name("broken.csv")
    broken.write_text(corpus.read_text().replace("\n3.png", "\nnone.png"))
    assert main(*words(broken, tmp_path / "out", "--cluster", "local")) == 2
    assert "none.png" in capfd.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_array_and_the_merge_that_waits_for_it(tmp_path, corpus, slurm, capfd):
    out = tmp_path / "out"
    assert main(*words(corpus, out, "--array", "1", "--partition", "cpu", "--time", "2:00:00")) == 0
    output = capfd.readouterr().out
    assert "jobs 40 (2 parts) and 41 (merge)" in output
    assert "2 of 2 parts written" in output
    assert "nothing dropped" in output, "the report of the merge is shown"
    assert sum(each.samples for each in load(out).shards) == 10
    [parts] = (tmp_path / "out.logs").glob("*/parts.sh")
    script = parts.read_text()
    for line in ("array=1-2%1", "cpus-per-task=1", "partition=cpu", "time=120", "requeue", "open-mode=append"):
        assert f"#SBATCH --{line}\n" in script
    code = re.search(r"-u (\S+)/toolkit/make_shards.py table", script)[1]
    assert Path(code).is_relative_to(tmp_path / "out.logs" / "code"), "the nodes run a copy of the code"
    assert main(*words(corpus, out)) == 0
    assert "finished already" in capfd.readouterr().out
    assert (slurm / "number").read_text() == "42\n", "nothing was submitted for shards that are there"


def test_a_part_that_fails_on_a_node_is_named(tmp_path, corpus, slurm, capfd):
    broken = corpus.with_name("broken.csv")
    broken.write_text(corpus.read_text().replace("\n3.png", "\nnoise.png"))
    corpus.with_name("noise.png").write_bytes(b"no picture")  # of one part
    assert main(*words(broken, tmp_path / "out")) == 2
    captured = capfd.readouterr()
    assert re.search(r"1 of 2 parts written, failed: [12]\n", captured.out)
    assert captured.err.startswith("error: ")
    assert "noise.png" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_part_that_was_killed(tmp_path, corpus, slurm, capfd):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 7\n")
    assert main(*words(corpus, tmp_path / "out")) == 1
    assert "error: part 1 was killed or never started" in capfd.readouterr().err


def test_a_job_that_slurm_refuses(tmp_path, corpus, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="SLURM refused the job: sbatch: error: invalid partition"):
        shard.main(words(corpus, tmp_path / "out"))


@pytest.mark.parametrize(
    ("section", "there", "missing"),
    [
        ("{exclusive: true, mail_type: [END, FAIL]}", ["exclusive", "mail-type=END,FAIL", "requeue"], ["no-requeue"]),
        ("{requeue: false}", ["no-requeue"], ["requeue"]),
        ("{requeue: null, wckey: null, x: 'n[1-2]'}", ["exclude='n[1-2]'"], ["requeue", "no-requeue", "wckey"]),
        ('{gres: "gpu:4,nvme:1"}', ["gres=nvme:1"], ["gpus-per-node"]),
        ("{gpus: 4}", ["requeue"], ["gpus", "gpus-per-node"]),
    ],
)
def test_both_scripts_have_the_options_of_the_profile(tmp_path, corpus, slurm, capfd, section, there, missing):
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"srun: [--container-image=i.sqsh]\npython: /in/the/image\nsbatch: {section}")
    assert main(*words(corpus, tmp_path / "my out", "--profile", profile, "--dry-run")) == 0
    output = capfd.readouterr().out
    lines = output.splitlines()
    for option in (*there, "job-name='shards-my out'"):
        assert lines.count(f"#SBATCH --{option}") == 2, option
    assert f"#SBATCH --output='{tmp_path}/my out.logs/TIME/%a.log'" in lines
    assert not [line for line in lines for option in missing if re.match(rf"#SBATCH --{option}(=|$)", line)]
    assert "/in/the/image" not in output, "without srun there is no container of srun's"


def test_a_dry_run_writes_nothing(tmp_path, corpus, slurm, capfd):
    assert main(*words(corpus, tmp_path / "out", "--dry-run")) == 0
    output = capfd.readouterr().out
    assert "nothing is written" in output
    assert "#SBATCH --array=1-2\n" in output
    assert output.count("#SBATCH --time=720\n") == 2, "twelve hours"
    assert "make_shards.py merge --out" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "0"], "--parts 0: expected 1 to"),
        (["--part", "1/2"], "--part is for make_shards.py alone: give --parts N"),
        (["--restart"], "--restart is for make_shards.py alone: remove"),
        (["--array", "-1"], "--array -1: expected"),
        (["--time", "soon"], "--launch.time soon"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_errors_are_one_line(tmp_path, corpus, slurm, more, message):
    with pytest.raises(UserError) as raised:
        shard.main(words(corpus, tmp_path / "out", *more))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
