"""The dry run: what a submission would ask for, take and write, and what is wrong with it. Nothing is submitted."""

from collections.abc import Iterable
from pathlib import Path

from launch.executor import JobSpec, executor
from launch.preflight.checks import Check, check_script, data_checks, disk, distinct, job_checks
from launch.preflight.estimate import count, estimate
from launch.snapshot import ROOT, place, read_code
from launch.status.state import check_idle
from shards.errors import UserError
from shards.remote import is_url
from toolkit.config.schema import Config


def preview(jobs: list[JobSpec], folder: Path) -> tuple[str, bool]:
    """Describe a submission.

    Args:
        jobs: One, or the members of a grid, which differ in their configuration only.
        folder: The run or grid folder; nothing is written to it.

    Returns:
        Text, and whether all checks passed.
    """
    first = jobs[0]
    lines = [*resources(first), *steps(first), *sizes(first)]
    if len(jobs) > 1:
        lines += ["", f"members of the grid, {first.config.launch.array or len(jobs)} at a time:"]
        lines += [f"  {Path(job.config.run).name}" for job in jobs]
    lines += ["", "shards:", *(f"  {line}" for line in shard_plan(first))]
    runs = [Path(job.config.run) for job in jobs]
    checks: list[tuple[str, Check]] = [("", Check("earlier jobs", lambda: check_idle(runs)))]
    for job in jobs:
        name = f"{Path(job.config.run).name}: " if len(jobs) > 1 else ""
        checks += [(name, check) for check in job_checks(job)]
        checks += [(name, check) for check in data_checks(job) if not to_be_made(job.config)]
    if first.cluster == "slurm":
        text = script(first, folder, len(jobs))
        lines += ["", "script:", text.rstrip("\n")]
        checks.append(("", Check("sbatch --test-only", lambda: check_script(text))))
    found, well = _looked_at(distinct(checks))
    return "\n".join([*lines, "", "checks:", *found]), well


def resources(asked: JobSpec) -> list[str]:
    """What is asked of the cluster."""
    launch = asked.config.launch
    where = f"{asked.cluster}, profile {asked.profile.name}" if asked.cluster == "slurm" else asked.cluster
    asks = {
        "partition": launch.partition or "the default one",
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "time": launch.time,
    }
    kind, _, gpus = str(launch.gpus_per_node or 0).rpartition(":")
    nodes = f"{launch.nodes} x {asked.ranks_per_node} = {asked.ranks} ranks, {gpus} GPUs a node"
    nodes += f" ({kind})" if kind else ""
    lines = [f"job: {asked.name}, run folder {asked.config.run}", f"cluster: {where}", f"nodes: {nodes}"]
    if asked.cluster == "slurm":
        lines.append("asked for: " + ", ".join(f"{key} {value}" for key, value in asks.items() if value))
    return lines


def steps(asked: JobSpec) -> list[str]:
    """The batch and the length of the run."""
    training = asked.config.training
    unit = asked.ranks * training.accumulation
    each = f"{training.batch_size / unit:g} pairs x {asked.ranks} ranks x {training.accumulation} micro-batches"
    return [f"batch: {training.batch_size:,} pairs = {each}", f"steps: {training.steps:,}"]


def sizes(asked: JobSpec) -> list[str]:
    """Expected memory and disk."""
    from shards.reading.dry_run import bytes_text

    config = asked.config
    counts = count(config)
    if counts is None:
        trunks = " and ".join(filter(None, (config.model.speech.trunk, config.model.image.trunk)))
        return [f"memory and disk: unknown before {trunks} is on this machine"]
    took = estimate(config, counts, asked.ranks)
    parts = {
        "weights": took.weights, "gradients": took.gradients, "optimizer": took.optimizer, "teacher": took.teacher,
        "queue": took.queue,
    }  # fmt: skip
    kept = config.training.keep_checkpoints + 1
    return [
        f"parameters: {counts.total / 1e6:,.1f} M, of which {counts.trained / 1e6:,.1f} M are trained",
        f"memory of a rank: {bytes_text(took.rank)} ({', '.join(f'{k} {bytes_text(v)}' for k, v in parts.items())}; "
        f"ZeRO {config.training.zero_stage}, {config.training.precision}) and the activations",
        f"disk: up to {bytes_text(disk(config, took.checkpoint, took.export))} ({kept} checkpoints of "
        f"{bytes_text(took.checkpoint)} and one on its way, 2 exports of {bytes_text(took.export)})",
    ]


def shard_plan(asked: JobSpec) -> list[str]:
    """Who reads what, from the manifests."""
    from toolkit.train import dry_run

    if to_be_made(asked.config):
        return [f"{asked.config.data.shards}: not there; made first: make_shards.py {' '.join(asked.config.data.make)}"]
    try:
        return dry_run(asked.config, asked.ranks).splitlines()
    except UserError as error:
        return [f"no plan: {error}"]


def to_be_made(config: Config) -> bool:
    """Are the shards to be made by the submission?"""
    data = config.data
    return bool(data.make) and not is_url(data.shards) and not (Path(data.shards) / "manifest.json").is_file()


def script(asked: JobSpec, folder: Path, members: int = 1) -> str:
    """The text that submitit would hand to sbatch, with the time of submission open.

    Args:
        asked: The job.
        folder: The run folder, or the grid's.
        members: Of a grid; more than one make a job array.
    """
    made = executor(asked, folder.absolute() / "logs" / "TIME", place(folder, read_code(ROOT)))._executor
    if members > 1:
        made.parameters["map_count"] = members  # what submitit sets when it submits an array
    return str(made._make_submission_file_text(made._submitit_command_str, "TIME"))


def _looked_at(checks: Iterable[tuple[str, Check]]) -> tuple[list[str], bool]:
    lines, well = [], True
    for prefix, check in checks:
        try:
            lines.append(f"  ok      {prefix}{check.name}: {check.look()}")
        except UserError as error:
            lines.append(f"  FAILED  {prefix}{check.name}: {error}")
            well = False
    return lines, well
