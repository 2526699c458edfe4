"""Run shards (if missing), training and evaluation as one job, on SLURM where there is one, else on this machine."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.follow import Local, Running, Slurm, follow
from launch.job import Job
from shards.errors import UserError, run_main
from toolkit.config import Config, micro_batch
from toolkit.config_loader import Parser, parse
from toolkit.run_folder import check_run, to_yaml

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("cluster", "nodes", "ranks_per_node", "gpus_per_node", "partition", "time", "cpus_per_rank")


def main(arguments: list[str] | None = None) -> None:
    """Submit the job, follow its log, and exit with its status.

    Raises:
        UserError: The configuration, the shards, the run folder or the cluster do not fit.
    """
    parser = Parser(__doc__)
    for name in SHORT:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"the same as --launch.{name}")
    config = parse(list(lengthen(sys.argv[1:] if arguments is None else arguments)), parser)[0]
    cluster = choose_cluster(config)
    ranks = ranks_per_node(config, cluster)
    minutes(config.launch.time)
    micro_batch(config, config.launch.nodes * ranks)
    check_run(config)
    make_shards(config)
    check_splits(config)

    folder = new_folder(Path(config.run) / "logs")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    signal.signal(signal.SIGTERM, _interrupt)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    work = Job(str(folder / "config.yaml"), str(folder), _free_port() if cluster == "local" else None, visible)
    job = submit(work, config, cluster, ranks)
    print(f"job {job.id} ({cluster}): {config.launch.nodes * ranks} ranks, run {config.run}, logs {folder}", flush=True)
    sys.exit(watch(job, folder, config.launch.nodes * ranks))


def lengthen(arguments: list[str]) -> Iterator[str]:
    """Write the short options out: `--nodes 4` is `--launch.nodes 4`."""
    for word in arguments:
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        yield f"--launch.{key}{equals}{value}" if name.startswith("--") and key in SHORT else word


def choose_cluster(config: Config) -> str:
    """Where to run: "slurm" or "local".

    Raises:
        UserError: SLURM is asked for and not there, or several nodes are and there is no SLURM.
    """
    launch = config.launch
    missing = [tool for tool in ("sbatch", "srun", "squeue") if shutil.which(tool) is None]
    if launch.cluster == "slurm" and missing:
        raise UserError(f"--launch.cluster slurm: {', '.join(missing)} not found here; run this where SLURM is")
    cluster = "local" if launch.cluster == "local" or missing else "slurm"
    if cluster == "local" and launch.nodes > 1:
        raise UserError(f"--launch.nodes {launch.nodes} needs SLURM; here, set --launch.ranks_per_node for more ranks")
    return cluster


def ranks_per_node(config: Config, cluster: str) -> int:
    """One rank a GPU, or 2 where there is none, if the configuration does not say."""
    gpus = config.launch.gpus_per_node or (count_gpus() if cluster == "local" else 0)
    return config.launch.ranks_per_node or gpus or 2


def count_gpus() -> int:
    """GPUs of this machine that the user lets be seen; found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return len(re.findall(r"^GPU ", listed, re.MULTILINE))


def minutes(time_limit: str) -> int:
    """A time limit in SLURM's notation, in whole minutes.

    Raises:
        UserError: It is not one.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", time_limit.strip())
    total = 0
    if match:
        clock = [int(part) for part in match[2].split(":")]
        if match[1] is None and len(clock) < 3:  # minutes, or minutes:seconds
            clock = [0, *clock]
        hours, minute, second = (*clock, 0, 0)[:3]
        total = (int(match[1] or 0) * 24 + hours) * 60 + minute + (second + 59) // 60
    if total < 1:
        raise UserError(f"--launch.time {time_limit}: expected minutes, hours:minutes:seconds or days-hours:minutes")
    return total


def make_shards(config: Config) -> None:
    """Write the shards if there are none and the configuration says how.

    Raises:
        UserError: There are none, and it does not say.
        SystemExit: make_shards failed, with its exit code.
    """
    from shards.remote import is_url

    data = config.data
    if is_url(data.shards) or (Path(data.shards) / "manifest.json").is_file():
        return
    if not data.make:
        how = f"make them with python toolkit/make_shards.py CORPUS --root DIR --out {data.shards}"
        raise UserError(f"no shards in {data.shards} (no manifest.json): {how}")
    script = ROOT / "toolkit" / "make_shards.py"
    code = subprocess.run([sys.executable, str(script), *data.make, "--out", data.shards]).returncode
    if code:
        sys.exit(code)


def check_splits(config: Config) -> None:
    """Look for the configured splits before a job waits in a queue for nothing.

    Raises:
        UserError: The shards lack one.
    """
    from shards.manifest import load

    manifest = load(config.data.shards)
    wanted = [config.data.train, config.data.dev if config.evaluation.every else "", config.final.split]
    for split in filter(None, wanted):
        manifest.rows(split)


def new_folder(parent: Path) -> Path:
    """Make a folder named after the time: job numbers of this machine come round again."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; name another with --run DIR") from None
        return folder.resolve()
    raise UserError(f"{parent} holds too many folders of this second")


def submit(work: Job, config: Config, cluster: str, ranks: int) -> Running:
    """Hand the job to submitit.

    Args:
        work: What each rank does.
        config: Its section `launch` says with what.
        cluster: "slurm" or "local".
        ranks: Per node.

    Raises:
        UserError: SLURM refuses it.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONPATH"] = paths  # the ranks unpickle launch.job.Job by its name
    executor = submitit.AutoExecutor(folder=work.folder, cluster=cluster)
    limit = minutes(config.launch.time)
    executor.update_parameters(name=Path(config.run).name, timeout_min=limit, tasks_per_node=ranks)
    if cluster == "slurm":
        executor.update_parameters(**slurm_parameters(config, paths))
    # The controller of a local job ignores the terminal's Ctrl-C: this process ends the job, with no traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = executor.submit(work)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused the job: {' '.join(str(error).split())}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    return Local(job, Path(work.folder), ranks) if cluster == "local" else Slurm(job.job_id)


def slurm_parameters(config: Config, python_path: str) -> dict[str, Any]:
    """What is asked of SLURM, in submitit's names."""
    launch = config.launch
    cores = launch.cpus_per_rank or config.data.workers + 2
    return {
        "nodes": launch.nodes,
        "cpus_per_task": cores,
        "gpus_per_node": launch.gpus_per_node or None,
        "slurm_partition": launch.partition,
        # When a rank fails all end; and srun does not take over the batch job's --cpus-per-task since SLURM 22.05.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cores}"],
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(python_path)}"],
    }


def watch(job: Running, folder: Path, ranks: int) -> int:
    """Follow the job; an interrupt ends a job of this machine, and leaves one on a cluster alone."""
    try:
        return follow(job, folder, ranks)
    except KeyboardInterrupt:
        if isinstance(job, Slurm):
            print(f"job {job.id} goes on; scancel {job.id} ends it", file=sys.stderr)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            job.end()
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run_main(main)
