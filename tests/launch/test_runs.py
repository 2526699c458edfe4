"""Status, cancel, resume and the table of a sweep: of real local jobs, and of folders as jobs of SLURM leave them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from launch import runs
from launch.job import Job, Status
from launch.slurm.client import SlurmJob, find_jobs
from launch.status.state import FROM_FILES, check_idle, find_runs, run_states
from shards.errors import UserError
from tests.launch.cluster import write_commands
from tests.launch.records import attempt, rank, record

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks need not find this file
ROOT = Path(__file__).resolve().parents[2]


class Saving(Job):
    """Waits for a signal, takes a moment to save, and leaves as a training does."""

    def work(self):
        Path(self.folder, f"began{os.environ['RANK']}").touch()
        try:
            time.sleep(600)
        except SystemExit:
            time.sleep(0.5)
            Path(self.folder, f"saved{os.environ['RANK']}").touch()
            raise


class Broken(Job):
    def work(self):
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("the second rank divided by zero")


def start(kind, run):
    """A job of two ranks on this machine, recorded as `launch/submit.py` does."""
    import submitit

    folder = run / "logs" / "1"
    folder.mkdir(parents=True)
    executor = submitit.AutoExecutor(folder=folder, cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    job = executor.submit(kind("none.yaml", str(folder), port=1))
    record(run, "1", job=str(job.job_id), cluster="local", ranks=2, nodes=1)
    return folder, job


def log(run, *records):
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def recall(mean, split="test", rerank=None):
    both = {way: {"R@1": mean - 1, "R@5": 50.0, "R@10": mean + 9} for way in ("speech_to_image", "image_to_speech")}
    reranked = None if rerank is None else {"mean_R@1": rerank}
    return {"split": split, "coarse": both | {"mean_R@1": mean}, "reranked": reranked}


def state_of(run):
    return run_states([run])[0]


def state_and_reason(run):
    state = state_of(run)
    return state.state, state.reason


def fake(tmp_path, monkeypatch, **tools):
    """Commands that answer as SLURM does."""
    write_commands(tmp_path / "bin", tools)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch, tmp_path):
    """As if SLURM were not here, whatever this machine has."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_a_failed_job_shows_its_traceback(tmp_path, capsys):
    folder, job = start(Broken, tmp_path / "run")
    while not job.done():
        time.sleep(0.05)
    runs.main(["status", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert " failed " in out
    assert "rank 1 failed with exit code 1" in out
    assert "    ZeroDivisionError: the second rank divided by zero" in out
    assert str(folder / f"{job.job_id}_1_log.err") in out
    [values] = shown(capsys, "status", str(tmp_path / "run"))
    assert (values["state"], values["failure"]["rank"], values["failure"]["code"]) == ("failed", 1, 1)


def shown(capsys, *arguments):
    runs.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_cancel_lets_the_ranks_save(tmp_path, capsys, monkeypatch):
    folder, job = start(Saving, tmp_path / "run")
    while len(list(folder.glob("began*"))) < 2:
        time.sleep(0.05)
    assert state_of(tmp_path / "run").state == "running"
    with pytest.raises(UserError, match=r"job \d+ is running: python launch/runs\.py cancel"):
        check_idle([tmp_path / "run"])
    monkeypatch.chdir(tmp_path)
    assert state_of(Path("run")).state == "running", "by a relative path too"
    runs.main(["cancel", str(tmp_path / "run")])
    assert [Status(folder, number).read()["exit"] for number in range(2)] == [75, 75]
    assert len(list(folder.glob("saved*"))) == 2
    assert state_of(tmp_path / "run").state == "stopped"
    job.wait()  # it is this process's child
    assert job.done()
    with pytest.raises(UserError, match="has ended already"):
        runs.main(["cancel", str(tmp_path / "run")])


def test_follow_a_recorded_job_from_another_process(tmp_path):
    folder, _ = start(Broken, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "follow", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert folder.name == "1"


def test_another_process_with_the_number_is_not_taken_for_the_job(tmp_path):
    record(tmp_path, cluster="local", job=str(os.getpid()))
    assert state_of(tmp_path).state == "failed"
    with pytest.raises(UserError, match="has ended already"):
        runs.cancel(tmp_path)


def test_a_job_of_another_machine(tmp_path):
    rank(record(tmp_path, cluster="local", host="elsewhere"), 0)
    assert (state_of(tmp_path).state, state_of(tmp_path).reason) == ("running", FROM_FILES)
    with pytest.raises(UserError, match="this job runs on elsewhere"):
        runs.cancel(tmp_path)


def test_from_the_folder_alone(tmp_path):
    """The states of a job in turn, without SLURM."""
    folder = record(tmp_path)
    assert state_and_reason(tmp_path) == ("waiting", FROM_FILES)
    attempt(folder, restart=0, began=1.0, hosts=["n1"])
    rank(folder, 0)
    assert state_and_reason(tmp_path) == ("running", FROM_FILES)
    rank(folder, 0, 75)
    attempt(folder, restart=0, ended=2.0, code=75, requeued=True, why="stopped by a signal: restarting", cause="saved")
    assert state_and_reason(tmp_path) == ("waiting", "stopped by a signal: restarting")
    attempt(folder, restart=1, began=3.0, hosts=["n1"])
    rank(folder, 0, restart=1)
    assert state_and_reason(tmp_path) == ("running", FROM_FILES)
    assert state_of(tmp_path).restarts == 1
    rank(folder, 0, 1, restart=1)
    attempt(folder, restart=1, ended=4.0, code=1, requeued=False, why="a rank failed", cause="failed")
    assert state_and_reason(tmp_path) == ("failed", "rank 0 failed with exit code 1")
    rank(folder, 0, 75, restart=1)
    attempt(folder, restart=1, ended=4.0, code=75, requeued=False, why="cancelled: no restart", cause="cancelled")
    assert state_and_reason(tmp_path) == ("cancelled", "cancelled: no restart")
    rank(folder, 0, 0, restart=1)
    assert state_and_reason(tmp_path) == ("done", "")


def test_two_jobs_of_one_run_are_refused(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, squeue='echo "17|PENDING|Resources"; echo "19_2|RUNNING|None"', sacct="exit 1")
    record(tmp_path / "waits", job="17")
    record(tmp_path / "member", job="19", index="2")
    record(tmp_path / "ended", job="19", index="1")
    with pytest.raises(UserError, match=r"waits: job 17 is waiting: python launch/runs.py cancel"):
        check_idle([tmp_path / "ended", tmp_path / "waits"])
    with pytest.raises(UserError, match=r"member: job 19_2 is running"):
        check_idle([tmp_path / "member"])
    assert check_idle([tmp_path / "ended", tmp_path / "new"]) == "none pending or running"


def test_cancel_of_a_sweep_reaches_a_member_that_was_submitted_again(tmp_path, monkeypatch, capsys):
    cancelled = tmp_path / "cancelled"
    grid = tmp_path / "grid"
    answers = 'echo "17_0|RUNNING|None"; echo "30|PENDING|None"'
    fake(tmp_path, monkeypatch, squeue=answers, sacct="exit 1", scancel=f'echo "$@" > {cancelled}')
    members = {str(n): str(record(grid / name, job="17", index=str(n))) for n, name in enumerate("abc")}
    rank(record(grid / "b", job="17", index="1"), 0, 0)
    record(grid / "c", name="2", job="30", time=time.time() + 9)
    record(grid, members=members)
    runs.main(["cancel", str(grid)])
    assert cancelled.read_text().split() == ["17_0", "30"]
    assert "job 17_0, 30 is being cancelled" in capsys.readouterr().out


def test_cancel_without_slurm(tmp_path):
    record(tmp_path)
    with pytest.raises(UserError, match="no scancel here: cancel it where SLURM is"):
        runs.main(["cancel", str(tmp_path)])


def test_the_state_in_slurm_comes_first(tmp_path, monkeypatch):
    answers = 'echo "17|PENDING|Resources"; echo "18|RUNNING|None"; echo "19_2|PENDING|JobArrayTaskLimit"'
    fake(
        tmp_path,
        monkeypatch,
        squeue=answers,
        sacct='echo "20|CANCELLED by 0"; echo "21|OUT_OF_MEMORY"; echo "22|RUNNING"',
    )
    names = {"17": "waiting", "18": "running", "19": "waiting", "20": "cancelled", "21": "failed", "22": "failed"}
    for job in names:
        rank(record(tmp_path / job, job=job, index="2" if job == "19" else None), 0)
    states = run_states([tmp_path / job for job in names])
    assert [state.state for state in states] == list(names.values())
    assert [state.reason for state in states[:3]] == ["Resources", "", "JobArrayTaskLimit"]
    assert states[4].reason == "out_of_memory"


def test_no_answer_from_slurm(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert find_jobs({"17"}) == {}
    fake(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert find_jobs({"17"}) == {"17": SlurmJob("", "", False)}


def test_step_pace_and_recall(tmp_path):
    run = tmp_path / "run"
    rank(record(run), 0)
    (run / "config.yaml").write_text("training: {steps: 1000}\n")
    log(run, *({"step": step, "seconds": 10.0 * step, "loss": 1.0} for step in range(20, 400, 20)))
    log(run, {"step": 380, "dev": recall(12.5)}, {"event": "saving", "seconds": 2.0})
    # Taken up again from an earlier checkpoint, and four times as fast.
    log(run, *({"step": step, "seconds": 3000 + 2.5 * step, "loss": 1.0} for step in range(320, 500, 20)))
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 500, "sec')
    state = state_of(run)
    assert (state.step, state.steps, state.recall) == (480, 1000, 12.5)
    assert state.eta == pytest.approx(2.5 * 520)


def test_a_long_log_is_read_from_its_end(tmp_path):
    log(tmp_path, {"step": 1, "dev": recall(33.0), "text": "é" * 70_000}, *({"event": "x" * 99} for _ in range(3000)))
    log(tmp_path, {"step": 9, "seconds": 1.0})
    state = state_of(tmp_path)
    assert (state.step, state.recall) == (9, 33.0)
    for cut in range(1, 40):  # a piece may begin anywhere in a line, also in the middle of a character
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write("\n" * cut)
        assert state_of(tmp_path).recall == 33.0


def test_a_run_that_is_done(tmp_path, capsys):
    run = tmp_path / "runs" / "run"
    rank(record(run), 0, 0)
    log(run, {"step": 4, "dev": recall(12.5), "seconds": 1.0})
    (run / "config.yaml").write_text("training: {steps: 4}\n")
    (run / "recall.json").write_text(json.dumps(recall(20.0, rerank=25.0)))
    [values] = shown(capsys, "status", str(tmp_path / "runs"))
    assert (values["state"], values["split"], values["mean_R@1"]) == ("done", "test", 25.0)
    runs.main(["status", str(run)])
    assert "test 25.0" in capsys.readouterr().out


def test_the_table_of_a_sweep(tmp_path, capsys):
    """Members as they come: done, failed on the node, under way, waiting for their turn."""
    grid, members = tmp_path / "grid", {}
    for index, name in enumerate(("done", "mistaken", "under-way", "to-come")):
        folder = record(grid / name, index=str(index), logs=str(grid / "logs" / "1"))
        members[str(index)] = str(folder)
        if name == "done":
            rank(folder, 0, 0)
            (grid / name / "recall.json").write_text(json.dumps(recall(20.0, rerank=25.0)))
        elif name == "mistaken":
            rank(folder, 0, 2)
            attempt(folder, restart=0, ended=1.0, code=2, requeued=False, why="a mistake", cause="mistake")
        elif name == "under-way":
            rank(folder, 0)
            log(grid / name, {"step": 3, "seconds": 1.0}, {"step": 3, "dev": recall(5.0, "val")})
    record(grid, members=members)
    (grid / "logs" / "1" / "17_1_0_log.err").write_text("noise\nerror: the batch does not divide\n")
    values = shown(capsys, "table", str(grid))
    assert [(each["member"], each["state"], each["mean_R@1"], each["split"]) for each in values] == [
        ("done", "done", 20.0, "test"),
        ("mistaken", "failed", None, None),
        ("under-way", "running", 5.0, "val"),
        ("to-come", "waiting", None, None),
    ]
    assert values[0]["speech_to_image R@10"] == 29.0
    assert values[0]["reranked mean_R@1"] == 25.0
    runs.main(["table", str(grid)])
    out = capsys.readouterr().out
    assert "4 members: 1 done, 1 failed, 1 running, 1 waiting" in out
    assert f"{grid / 'mistaken'} failed: rank 0 failed with exit code 2\n    error: the batch does not divide\n" in out
    assert "noise" not in out
    assert find_runs(tmp_path) == [grid / name for name in ("done", "mistaken", "to-come", "under-way")]


def test_resume_gives_the_recorded_command(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "subprocess.run", lambda words, cwd: calls.append((words[1:], cwd)) or subprocess.CompletedProcess(words, 7)
    )
    run, place = tmp_path / "run", tmp_path / "place"
    place.mkdir()
    folder = record(run, command=["--config", "x.yaml", "--nodes", "2"], directory=str(place))
    rank(folder, 0, 75)
    attempt(folder, restart=0, ended=1.0, code=75, requeued=False, why="", cause="saved")
    with pytest.raises(SystemExit) as ended:
        runs.main(["resume", str(run)])
    assert ended.value.code == 7
    script = str(ROOT / "launch" / "submit.py")
    assert calls == [([script, "--config", "x.yaml", "--nodes", "2", "--run", str(run)], str(place))]
    # A member of a sweep alone, not the sweep.
    record(run, command=["--grid", "g.yaml"], directory=str(place), member=True)
    (folder / "config.yaml").write_text("launch: {nodes: 1, partition: null, time: '24:00:00', follow: true}\n")
    assert runs.resume(run) == 7
    launched = ["--launch.nodes=1", "--launch.partition=null", "--launch.time=24:00:00", "--launch.follow=true"]
    assert calls[1][0] == [script, "--config", str(folder / "config.yaml"), *launched, "--run", str(run)]
    record(run, directory=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone, the working directory of the command, does not exist"):
        runs.resume(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "none"], "none: no such folder"),
        (["status", "empty"], "empty is not a run folder and contains none"),
        (["table", "empty"], "empty is not a run folder and contains none"),
        (["follow", "empty"], "empty: no submission is recorded there"),
        (["cancel", "empty"], "empty: no submission is recorded there"),
        (["resume", "empty"], "empty: no submission is recorded there"),
        (["stauts"], "invalid choice: 'stauts'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        runs.main(arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_heavy_packages_are_not_imported_for_the_status(tmp_path):
    rank(record(tmp_path), 0, 0)
    code = f"import sys; from launch import runs; runs.main(['status', {str(tmp_path)!r}])\n"
    code += "sys.exit(str({'torch', 'numpy', 'submitit'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.strip() == "set()"
