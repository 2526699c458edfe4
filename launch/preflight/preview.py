"""The dry run of a submission: resources, sizes, batch script and checks. Nothing is submitted."""

from collections.abc import Iterable
from pathlib import Path

from launch.executor import JobSpec, executor
from launch.preflight.checks import Check, check_script, data_checks, disk, distinct, job_checks
from launch.preflight.estimate import count, estimate
from launch.snapshot import ROOT, read_code, snapshot_folder
from launch.status.state import check_idle
from shards.errors import UserError
from shards.remote import is_url
from toolkit.config.schema import Config


def preview(jobs: list[JobSpec], folder: Path) -> tuple[str, bool]:
    """Describe a submission.

    Args:
        jobs: One job, or the members of a grid, which differ in their configuration only.
        folder: Run or grid folder; nothing is written to it.

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
    results, ok = _run_checks(distinct(checks))
    return "\n".join([*lines, "", "checks:", *results]), ok


def resources(spec: JobSpec) -> list[str]:
    """Return lines on the resources."""
    launch = spec.config.launch
    where = f"{spec.cluster}, profile {spec.profile.name}" if spec.cluster == "slurm" else spec.cluster
    options = {
        "partition": launch.partition or "the default one",
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "time": launch.time,
    }
    kind, _, gpus = str(launch.gpus_per_node or 0).rpartition(":")
    nodes = f"{launch.nodes} x {spec.ranks_per_node} = {spec.ranks} ranks, {gpus} GPUs a node"
    nodes += f" ({kind})" if kind else ""
    lines = [f"job: {spec.name}, run folder {spec.config.run}", f"cluster: {where}", f"nodes: {nodes}"]
    if spec.cluster == "slurm":
        lines.append("requested: " + ", ".join(f"{key} {value}" for key, value in options.items() if value))
    return lines


def steps(spec: JobSpec) -> list[str]:
    """Return lines on the batch and the number of steps."""
    training = spec.config.training
    unit = spec.ranks * training.accumulation
    each = f"{training.batch_size / unit:g} pairs x {spec.ranks} ranks x {training.accumulation} micro-batches"
    return [f"batch: {training.batch_size:,} pairs = {each}", f"steps: {training.steps:,}"]


def sizes(spec: JobSpec) -> list[str]:
    """Return lines on the expected memory and disk."""
    from shards.reading.dry_run import bytes_text

    config = spec.config
    counts = count(config)
    if counts is None:
        trunks = " and ".join(filter(None, (config.model.speech.trunk, config.model.image.trunk)))
        return [f"memory and disk: unknown until {trunks} is on this machine"]
    memory = estimate(config, counts, spec.ranks)
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "teacher", "queue")}
    kept = config.training.keep_checkpoints + 1
    return [
        f"parameters: {counts.total / 1e6:,.1f} M, of which {counts.trained / 1e6:,.1f} M are trained",
        f"memory of a rank: {bytes_text(memory.rank)} ({', '.join(f'{k} {bytes_text(v)}' for k, v in parts.items())}; "
        f"ZeRO {config.training.zero_stage}, {config.training.precision}) and the activations",
        f"disk: up to {bytes_text(disk(config, memory.checkpoint, memory.export))} ({kept} checkpoints of "
        f"{bytes_text(memory.checkpoint)} and one being written, 2 exports of {bytes_text(memory.export)})",
    ]


def shard_plan(spec: JobSpec) -> list[str]:
    """Return lines on which rank reads which shards, from the manifests."""
    from toolkit.train import dry_run

    if to_be_made(spec.config):
        return [f"{spec.config.data.shards}: missing; written by make_shards.py {' '.join(spec.config.data.make)}"]
    try:
        return dry_run(spec.config, spec.ranks).splitlines()
    except UserError as error:
        return [f"no plan: {error}"]


def to_be_made(config: Config) -> bool:
    """Return whether the submission has to make the shards."""
    data = config.data
    return bool(data.make) and not is_url(data.shards) and not (Path(data.shards) / "manifest.json").is_file()


def script(spec: JobSpec, folder: Path, members: int = 1) -> str:
    """Return the batch script that submitit would submit, with TIME for the time of submission.

    Args:
        spec: Job.
        folder: Run folder, or that of the grid.
        members: Number of members of a grid; more than one are a job array.
    """
    made = executor(spec, folder.absolute() / "logs" / "TIME", snapshot_folder(folder, read_code(ROOT)))._executor
    if members > 1:
        made.parameters["map_count"] = members  # what submitit sets when it submits an array
    return str(made._make_submission_file_text(made._submitit_command_str, "TIME"))


def _run_checks(checks: Iterable[tuple[str, Check]]) -> tuple[list[str], bool]:
    lines, ok = [], True
    for prefix, check in checks:
        try:
            lines.append(f"  ok      {prefix}{check.name}: {check.run()}")
        except UserError as error:
            lines.append(f"  FAILED  {prefix}{check.name}: {error}")
            ok = False
    return lines, ok
