"""The wandb run: no failure of its server, key or processes ends the training, and all restarts are one run."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.files import read_records
from tests.distributed import run_ranks
from tests.toolkit.training import test_trainer
from tests.toolkit.training.log_lines import collect_lines
from tests.toolkit.training.metrics.wandb_server import KEY, WandbServer
from toolkit.config.schema import Wandb
from toolkit.training.checkpointing.progress import Progress
from toolkit.training.metrics import wandb_run
from toolkit.training.metrics.wandb_run import WandbRun, check_wandb, open_wandb

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, mode or server of the machine that tests run on."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "60")
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


@pytest.fixture
def logged() -> list[str]:
    """The log lines of the training."""
    return collect_lines()


def opened(run: Path, mode: str = "auto", progress: Progress | None = None) -> WandbRun:
    result = open_wandb(Wandb(mode=mode), run, progress or Progress())  # type: ignore[arg-type]
    assert result
    return result


def write(record: WandbRun, *steps: int) -> None:
    """Log some steps, none of which may take time."""
    for step in steps:
        begin = time.perf_counter()
        record.log({"step": step, "loss": 1.0 / (1 + step)})
        assert time.perf_counter() - begin < 0.1


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def finished(record: WandbRun, seconds: float = 4.0) -> None:
    begin = time.monotonic()
    record.finish(seconds)
    assert time.monotonic() - begin < 1.5 * seconds + 25


def wait_until_open(record: WandbRun) -> None:
    wait_until(record._opened.is_set)


def sync(run: Path, *more: str) -> None:
    """Upload the offline parts, as a user would."""
    command = [str(Path(sys.executable).with_name("wandb")), "sync", "--yes", *more]
    parts = sorted((run / "wandb").glob("offline-run-*"))
    done = subprocess.run([*command, *map(str, parts)], cwd=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def steps(server: WandbServer, run: Path) -> list[int]:
    """The steps of the only run that the server has, each with its loss."""
    assert set(server.history) == {(run / "wandb_id").read_text()}
    (lines,) = server.history.values()
    for line in lines.values():
        assert line["loss"] == 1.0 / (1 + line["step"])
    return [lines[at]["step"] for at in sorted(lines)]


def test_an_online_run_is_complete_when_the_training_ends(server, logged, tmp_path) -> None:
    record = opened(tmp_path / "run")
    write(record, 1, 2, 3)
    wait_until_open(record)
    finished(record, 20.0)
    assert steps(server, tmp_path / "run") == [1, 2, 3]
    assert logged == []


@pytest.mark.parametrize(
    ("mode", "short"),
    [*((mode, False) for mode in ("refuse", "deny", "fail", "hang", "garble")), ("refuse", True), ("hang", True)],
)
def test_a_server_that_does_not_answer_at_the_start(server, logged, tmp_path, monkeypatch, mode, short) -> None:
    """Noticed during the training, or after a short one."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "60" if short else "2")
    run, server.mode = tmp_path / "run", mode
    if mode == "refuse":
        server.close()
    record = opened(run)
    write(record, 1, 2)
    if not short:
        wait_until(lambda: bool(logged))
    write(record, 3)
    finished(record)
    assert len(logged) == 1
    assert re.match(rf"wandb is offline: .+; later, `wandb sync {run}/wandb/offline-run-\*` uploads it$", logged[0])


@pytest.mark.parametrize("mode", ["refuse", "hang", "deny"])
def test_a_server_that_is_lost_under_way(server, logged, tmp_path, mode, monkeypatch) -> None:
    run, record = tmp_path / "run", opened(tmp_path / "run")
    write(record, 1, 2)
    wait_until_open(record)
    server.mode = mode
    if mode == "refuse":
        server.close()
    write(record, 3)
    finished(record)
    assert len(logged) <= 1
    other = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", other.url)
    sync(run) if logged else sync(run, "--include-online", str(next((run / "wandb").glob("run-*"))))
    assert steps(other, run) == [1, 2, 3], "nothing is lost"
    other.close()


def children(process: int) -> list[int]:
    """The processes that a process has started and that still run."""
    result = []
    for task in Path(f"/proc/{process}/task").iterdir():
        result += [int(word) for word in (task / "children").read_text().split()]
    return result


@pytest.mark.parametrize(
    ("what", "mode"),
    [
        ("process killed", "online"),
        ("process killed", "offline"),
        ("process stopped", "online"),
        ("service killed", "online"),
        ("service killed", "offline"),
        ("service stopped", "online"),
    ],
)
def test_a_process_of_wandb_that_dies_or_hangs(server, logged, tmp_path, monkeypatch, what, mode) -> None:
    monkeypatch.setattr(wandb_run, "_LOG", 2.0)
    run, record = tmp_path / "run", opened(tmp_path / "run", mode)
    write(record, 1, 2)
    wait_until_open(record)
    assert record._process
    process = record._process._child.pid
    (service,) = children(process)
    number = signal.SIGKILL if "killed" in what else signal.SIGSTOP
    os.kill(process if "process" in what else service, number)
    write(record, 3, 4)
    try:
        finished(record, 6.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(service, signal.SIGKILL)
    assert len(logged) == 1
    assert "wandb is offline: " in logged[0]
    server.history.clear()
    sync(run)
    assert steps(server, run) == [1, 2, 3, 4]


def test_the_folder_is_a_file(logged, tmp_path) -> None:
    (tmp_path / "run/wandb").write_text("")
    record = opened(tmp_path / "run", "offline")
    write(record, 1)
    finished(record)
    assert len(logged) == 1
    assert re.match(r"wandb (is off: |cannot write to .+: its files are in )", logged[0])


def record_on_a_full_disk(run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    record = opened(run, "offline")
    for step in range(300):
        write(record, step)
    finished(record)


def in_a_process(function: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; from pathlib import Path; from tests.toolkit.training.metrics.test_wandb_run import *; {function}"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_full_disk(tmp_path) -> None:
    done = in_a_process("record_on_a_full_disk(Path(sys.argv[1]))", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("wandb is ")]
    assert [line.split(":")[0] for line in lines] in (["wandb is offline", "wandb is off"], ["wandb is off"])


def test_a_wandb_id_that_cannot_be_stored(logged, tmp_path) -> None:
    (tmp_path / "run/wandb_id").mkdir()
    progress = Progress()
    finished(opened(tmp_path / "run", "offline", progress))
    assert logged == [f"{tmp_path}/run/wandb_id was not written: Is a directory; training goes on"]
    assert progress.wandb_id


def test_a_training_that_is_killed_leaves_all_that_it_has_logged(server, tmp_path) -> None:
    code = (
        "record = opened(Path(sys.argv[1]), 'offline'); write(record, 1, 2); wait_until_open(record);"
        "write(record, 3); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert in_a_process(code, tmp_path / "run").returncode == -signal.SIGKILL

    def closed() -> bool:
        server.history.clear()
        sync(tmp_path / "run")
        return steps(server, tmp_path / "run") == [1, 2, 3]

    time.sleep(2)
    wait_until(closed, 30)


@pytest.mark.parametrize("parts", ["offline online offline", "offline offline"])
def test_parts_online_and_offline_are_one_run(server, logged, tmp_path, parts) -> None:
    run, expected = tmp_path / "run", list(range(2 * len(parts.split())))
    for number, mode in enumerate(parts.split()):
        record = opened(run, mode)
        write(record, 2 * number, 2 * number + 1)
        wait_until_open(record)
        finished(record, 20.0)
    sync(run)
    assert sorted(steps(server, run)) == expected
    assert logged == []


def test_a_server_that_hangs_does_not_delay_the_training(server, shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    server.mode = "hang"
    settings = test_trainer.settings(shards, tmp_path / "run", batch_size=4, steps=3, log_every=1)
    settings.wandb.mode = "auto"
    begin = time.monotonic()
    run_ranks(test_trainer.train, 1, settings, timeout=90)
    assert time.monotonic() - begin < 60
    assert [record["step"] for record in read_records(tmp_path / "run/log.jsonl") if "loss" in record] == [1, 2, 3]
    server.mode = "accept"
    sync(tmp_path / "run")
    (lines,) = server.history.values()
    assert [line["step"] for line in lines.values()][:3] == [1, 2, 3]


@pytest.mark.parametrize("age", [0, 1000])
def test_a_part_that_was_killed_before_its_first_record_does_not_stop_the_upload_of_later_ones(
    server, logged, tmp_path, age
) -> None:
    run = tmp_path / "run"
    (run / "wandb_id").write_text("abc")
    part = run / "wandb/offline-run-20200101_000000-abc/run-abc.wandb"
    part.parent.mkdir(parents=True)
    part.write_bytes(b":W&B\xd7\xbe\x00")
    os.utime(part, (time.time() - age,) * 2)
    record = opened(run, "offline")
    write(record, 1)
    finished(record)
    assert part.exists() == (age == 0), "it may still be written"
    if age:
        sync(run)
        assert steps(server, run) == [1]


NO_KEY = "is online, and there is no key: run `wandb login`, or set WANDB_API_KEY"
SHORT = "holds no wandb key: it has 5 characters, a key has 40 or more; run `wandb login`"


@pytest.mark.parametrize(
    ("configured", "variables", "mode", "problem"),
    [
        ("auto", {}, "offline", ""),
        ("auto", {"WANDB_API_KEY": KEY}, "online", ""),
        ("auto", {"WANDB_API_KEY": f"local-{KEY}"}, "online", ""),
        ("auto", {"WANDB_API_KEY": "wandb_v1_" + 2 * KEY}, "online", ""),
        ("auto", {"WANDB_API_KEY": f"{KEY}.{KEY}.{KEY}"}, "online", ""),
        ("auto", {"WANDB_API_KEY": "short"}, "online", f"WANDB_API_KEY {SHORT}"),
        ("auto", {"WANDB_API_KEY": "local-short"}, "online", "WANDB_API_KEY holds no wandb key: it has 11 "),
        ("auto", {"WANDB_API_KEY": " " * 40}, "online", "WANDB_API_KEY holds no wandb key: it has 0 "),
        ("auto", {"WANDB_API_KEY": "/" * 40}, "online", "WANDB_API_KEY holds no wandb key: it has 40 "),
        ("auto", {"WANDB_MODE": "online"}, "online", f"WANDB_MODE {NO_KEY}"),
        ("auto", {"WANDB_MODE": "run"}, "online", f"WANDB_MODE {NO_KEY}"),
        ("auto", {"WANDB_MODE": "Online", "WANDB_API_KEY": KEY}, "online", ""),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, "offline", ""),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "short"}, "disabled", ""),
        ("auto", {"WANDB_MODE": "", "WANDB_API_KEY": KEY}, "online", ""),
        ("auto", {"WANDB_MODE": "onlin", "WANDB_API_KEY": KEY}, "offline", "WANDB_MODE is 'onlin'; expected online, "),
        ("online", {}, "online", f"wandb.mode {NO_KEY}"),
        ("online", {"WANDB_API_KEY": ""}, "online", f"wandb.mode {NO_KEY}"),
        ("online", {"WANDB_API_KEY": "short"}, "online", f"WANDB_API_KEY {SHORT}"),
        ("online", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "online", ""),
        ("offline", {"WANDB_API_KEY": "short"}, "offline", ""),
        ("disabled", {"WANDB_API_KEY": "short"}, "disabled", ""),
        ("online", {"WANDB_IDENTITY_TOKEN_FILE": "/token"}, "online", ""),
    ],
)
def test_mode_and_key(monkeypatch, logged, tmp_path, configured, variables, mode, problem) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begun: list[str] = []
    monkeypatch.setattr(wandb_run, "WandbRun", lambda options, mode: begun.append(mode))
    run, settings = tmp_path / "run", Wandb(mode=configured)
    if problem and mode == "online":
        with pytest.raises(UserError) as error:
            check_wandb(settings, run)
        assert str(error.value).startswith(problem)
        assert str(error.value).endswith("; or set --wandb.mode offline")
        (run / "checkpoints/step-00000001").mkdir(parents=True)
    check_wandb(settings, run)  # nothing that has been trained is ended by it
    open_wandb(settings, run, Progress())
    assert begun == [] if mode == "disabled" else ["offline" if problem else mode]
    assert [line.startswith(f"wandb is offline: {problem}") for line in logged] == [True] * bool(problem)


@pytest.mark.parametrize(
    ("hosts", "server", "has_key"),
    [
        (["api.wandb.ai"], None, True),
        (["api.forge.coreweave.com"], None, True),
        (["github.com"], None, False),
        (["here.org:8080"], "http://here.org:8080", True),
        (["here.org"], "file", True),
    ],
)
def test_keys_of_a_login(monkeypatch, tmp_path, hosts, server, has_key) -> None:
    lines = [f"machine {host} login user password {KEY}\n" for host in hosts]
    (tmp_path / "home/.netrc").write_text("".join(lines))
    (tmp_path / "home/.netrc").chmod(0o600)
    if server == "file":
        (tmp_path / "home/.config/wandb").mkdir(parents=True)
        (tmp_path / "home/.config/wandb/settings").write_text("[default]\nbase_url = https://here.org\n")
    elif server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert wandb_run.choose_mode(Wandb()) == ("online" if has_key else "offline", "")


def test_a_mistake_ends_the_run_before_it_begins(monkeypatch, shards, tmp_path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    command = ["--config", "quickstart", "--data.shards", str(shards), "--run", str(tmp_path / "new")]
    command += [
        "--data.train",
        "train",
        "--data.dev",
        "train",
        "--training.batch_size",
        "4",
        "--data.shuffle_shards",
        "2",
    ]
    done = subprocess.run([sys.executable, str(ROOT / "toolkit/train.py"), *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: WANDB_API_KEY {SHORT}")
    assert not (tmp_path / "new").exists()


def test_the_process_does_not_import_torch() -> None:
    code = "import toolkit.training.metrics.wandb_process, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
