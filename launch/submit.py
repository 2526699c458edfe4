"""Run make_shards (if shards are missing), training and evaluation as one job, on SLURM if there is one, else here."""

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import runs
from launch.executor import (
    JobSpec,
    allocated_cores,
    choose_cluster,
    executor,
    leave_job,
    ranks_per_node,
    same_resources,
)
from launch.job import Job, train_and_evaluate
from launch.preflight.checks import check_script, data_checks, distinct, job_checks
from launch.preflight.preview import preview, script, to_be_made
from launch.profiles import Profile, apply_profile, find_profile
from launch.record import MEMBERS, Submission, SubmissionRecord
from launch.snapshot import ROOT, snapshot
from launch.status.follow import Local, Running, Slurm, follow
from launch.status.state import check_idle
from launch.sweep import expand
from shards.errors import ExitCode, UserError, run_main
from toolkit.config.load import Parser, parse
from toolkit.config.schema import Config
from toolkit.run_folder import to_yaml

logger = logging.getLogger(__name__)

SHORT_OPTIONS = (
    "cluster", "profile", "name", "nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank", "partition", "account",
    "qos", "constraint", "time", "signal", "array",
)  # fmt: skip
FOLLOW_FLAGS = {"--follow": "--launch.follow=true", "--no-follow": "--launch.follow=false"}


def main(arguments: list[str] | None = None) -> None:
    """Submit the job, follow its log, and exit with its status.

    Raises:
        UserError: The configuration, the shards, the run folder or the cluster is not usable.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = list(expand_short_options(given))
    config, options = parse(words, _parser())
    cluster = choose_cluster(config.launch)
    profile = find_profile(config.launch) if cluster == "slurm" else Profile()
    jobs = [make_job_spec(member, cluster, profile, words) for member in members(config, options, words)]
    if cluster != "debug":
        leave_job(os.environ)
    if cluster == "slurm" and len(jobs) > 1:
        jobs = same_resources(jobs)
    if options.dry_run:
        text, ok = preview(jobs, Path(config.run))
        print(text)
        sys.exit(0 if ok else ExitCode.USER_ERROR)
    run_checks(jobs)
    if cluster == "slurm":
        check_script(script(jobs[0], Path(config.run), len(jobs)), only_permanent=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if cluster == "debug":
        sys.exit(debug(jobs))
    code = snapshot(Path(config.run))
    if len(jobs) == 1:
        sys.exit(run_one(jobs[0], given, code, member=bool(options.grid or options.sweep)))
    submit_all = submit_grid if cluster == "slurm" else run_grid
    sys.exit(submit_all(jobs, Path(config.run), given, code))


def _parser() -> Parser:
    parser = Parser(__doc__)
    for name in SHORT_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"the same as --launch.{name}")
    parser.add_argument(
        "--follow", "--no-follow", action="store_true", help="the same as --launch.follow true or false"
    )
    parser.add_argument("--dry-run", action="store_true", help="show and check what would be submitted")
    parser.add_argument(
        "--grid", metavar="FILE", help="a job array: a run for each member of a YAML file (slurm/grids)"
    )
    sweep = "values to combine with one another and with the grid; may be given several times"
    parser.add_argument("--sweep", metavar="KEY=V1,V2", action="append", default=[], help=sweep)
    return parser


def expand_short_options(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the words with short options expanded: `--nodes 4` is `--launch.nodes 4`."""
    for word in arguments:
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        if word in FOLLOW_FLAGS:
            yield FOLLOW_FLAGS[word]
        else:
            yield f"--launch.{key}{equals}{value}" if name.startswith("--") and key in SHORT_OPTIONS else word


def make_job_spec(config: Config, cluster: str, profile: Profile, words: Sequence[str]) -> JobSpec:
    """Return a job with the profile's values filled in."""
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    config = apply_profile(config, profile, given)
    ranks = ranks_per_node(config.launch, cluster)
    return JobSpec(cluster, config, profile, ranks, allocated_cores(os.environ) if cluster == "local" else None)


def members(config: Config, options: argparse.Namespace, words: list[str]) -> list[Config]:
    """Return the configurations of a grid's members, with run folders in that of the command; without a grid the one.

    Raises:
        UserError: The grid's file or a value in it is invalid.
    """
    if not (options.grid or options.sweep):
        return [config]
    name, configs = config.launch.name or Path(config.run).name, []
    for member in expand(options.grid or {}, options.sweep):
        names = [f"--run={Path(config.run) / member.name}", f"--launch.name={name}"]
        configs.append(parse([*words, *member.arguments, *names], _parser())[0])
    return configs


def run_checks(jobs: Sequence[JobSpec]) -> None:
    """Run all checks, and make missing shards, so that no job waits in a queue for nothing.

    Raises:
        UserError: The first check that failed.
        SystemExit: make_shards failed, with its exit code.
    """
    check_idle([Path(job.config.run) for job in jobs])
    for _, each in distinct(("", each) for job in jobs for each in job_checks(job)):
        each.run()
    for job in jobs:
        if to_be_made(job.config):
            make_shards(job.config)
    for _, each in distinct(("", each) for job in jobs for each in data_checks(job)):
        each.run()


def make_shards(config: Config) -> None:
    """Write the shards by the configuration's `data.make`.

    Raises:
        SystemExit: make_shards failed, with its exit code.
    """
    file = ROOT / "toolkit" / "make_shards.py"
    code = subprocess.run([sys.executable, str(file), *config.data.make, "--out", config.data.shards]).returncode
    if code:
        sys.exit(code)


def debug(jobs: Sequence[JobSpec]) -> int:
    """Run the jobs in this process, one after another, for use with a debugger."""
    for job in jobs:
        train_and_evaluate(str(_write_config(job)))
    return 0


def run_one(spec: JobSpec, command: list[str], code: Path, member: bool = False) -> int:
    """Submit one job and follow it.

    Args:
        spec: Job.
        command: Arguments of the command.
        code: Snapshot that the job runs.
        member: Whether the job is a member of a grid, which the command submits.

    Returns:
        Exit code of the job; 0 if it is not followed.
    """
    file = _write_config(spec)
    folder = file.parent
    (job,) = submit(spec, [_rank_job(spec, file)], folder, code)
    submission = _record(spec, job.id, command, code, member=member)
    submission.write(folder)
    logger.info("job %s (%s): %d ranks, run %s, logs %s", job.id, spec.cluster, spec.ranks, spec.config.run, folder)
    return watch(job, SubmissionRecord(folder, submission)) if spec.config.launch.follow else 0


def run_grid(jobs: Sequence[JobSpec], run: Path, command: list[str], code: Path) -> int:
    """Run all members on this machine, one after another, even if some fail; then print the table.

    Returns:
        0, or 1 if a member failed.
    """
    waiting = [replace(job, config=replace(job.config, launch=replace(job.config.launch, follow=True))) for job in jobs]
    codes = [run_one(job, command, code, member=True) for job in waiting]
    runs.table(run)
    return int(any(codes))


def submit_grid(jobs: Sequence[JobSpec], run: Path, command: list[str], code: Path) -> int:
    """Submit a SLURM job array; every member has a run folder, the array's files are in the grid's log folder.

    Returns:
        0, or 1 if the job is followed and a member failed.
    """
    folder = new_folder(run / "logs")
    files = [_write_config(job) for job in jobs]
    folders = {str(index): str(file.parent) for index, file in enumerate(files)}
    (folder / MEMBERS).write_text(json.dumps(folders, indent=1), encoding="utf-8")  # read when a member ends
    work = [_rank_job(job, file) for job, file in zip(jobs, files, strict=True)]
    array = submit(jobs[0], work, folder, code)[0].id.partition("_")[0]
    for index, (job, file) in enumerate(zip(jobs, files, strict=True)):
        _record(job, array, command, code, member=True, index=str(index), logs=str(folder)).write(file.parent)
    _record(jobs[0], array, command, code, run=str(run), members=folders).write(folder)
    limit = jobs[0].config.launch.array or len(jobs)
    members_text = f"{len(jobs)} members, {limit} at a time, {jobs[0].ranks} ranks each"
    logger.info("job %s (slurm): %s, logs %s", array, members_text, folder)
    if not jobs[0].config.launch.follow:
        logger.info("results so far: python launch/runs.py table %s", run)
        return 0
    try:
        return runs.follow(run)
    except KeyboardInterrupt:
        logger.warning("job %s is still running; scancel %s ends it", array, array)
        raise


def submit(spec: JobSpec, work: Sequence[Job], folder: Path, code: Path) -> list[Running]:
    """Hand a job, or a job array, to submitit.

    Args:
        spec: Resources; the same for all members of an array.
        work: Function that the ranks call, for each member.
        folder: Folder for submitit's files and the output of the ranks.
        code: Snapshot from which they import.

    Raises:
        UserError: SLURM refuses it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    made = executor(spec, folder, code)
    if spec.cluster == "local":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    # The controller of a local job ignores the terminal's Ctrl-C: this process ends the job, without a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        jobs = made.submit_array(work)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused the job: {' '.join(str(error).split())}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    if spec.cluster == "local":
        return [Local(job, folder, spec.ranks) for job in jobs]
    return [Slurm(str(job.job_id)) for job in jobs]


def watch(job: Running, recorded: SubmissionRecord) -> int:
    """Follow a job; an interrupt ends a job of this machine, but not one on a cluster."""
    try:
        return follow(job, recorded)
    except KeyboardInterrupt:
        if isinstance(job, Local):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            job.end()
        else:
            logger.warning("job %s is still running; scancel %s ends it", job.id, job.id)
        raise


def new_folder(parent: Path) -> Path:
    """Create a folder named after the time: job numbers of this machine are reused."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be created: {error.strerror}; name another with --run DIR") from None
        return folder.resolve()
    raise UserError(f"{parent} has too many folders of this second: try again")


def _write_config(spec: JobSpec) -> Path:
    """Create the log folder of a job and write its configuration there."""
    file = new_folder(Path(spec.config.run) / "logs") / "config.yaml"
    file.write_text(to_yaml(spec.config), encoding="utf-8")
    return file


def _rank_job(spec: JobSpec, file: Path) -> Job:
    port = _free_port() if spec.cluster == "local" else None
    return Job(
        config=str(file),
        folder=str(file.parent),
        port=port,
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        directory=os.getcwd(),
        cores=spec.cores,
    )


def _record(
    spec: JobSpec, job: str, command: list[str], code: Path, run: str | None = None, **more: object
) -> Submission:
    return Submission(
        job=job,
        cluster=spec.cluster,
        run=run or spec.config.run,
        nodes=spec.config.launch.nodes,
        ranks=spec.ranks,
        command=command,
        code=str(code),
        **more,  # type: ignore[arg-type]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
