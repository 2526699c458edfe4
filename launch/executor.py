"""Where a job runs (SLURM, this machine, this process) and with which resources."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.profiles import Profile
from launch.slurm import requeue
from launch.slurm.client import job_number, slurm_config
from launch.slurm.sbatch_options import merge_options, with_gpus
from shards.errors import UserError
from toolkit.config.schema import Config, Launch, gpu_count

TOOLS = ("sbatch", "srun", "squeue", "scontrol")
_CORES_BESIDE_WORKERS = 2  # cores of a rank on SLURM in addition to one for each loader worker
_JOB_VARIABLES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMI2_", "PMIX_")
# What SLURM's commands need to find a cluster, to authenticate and to print times; all others belong to a job.
_CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
# sbatch passes --export or SBATCH_EXPORT on to srun: NONE would withhold from the ranks what the batch script sets for
# them. A label before each line would hide the ranks' messages.
_SRUN_VARIABLES = ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SBATCH_EXPORT", "SLURM_LABELIO")


@dataclass(frozen=True)
class JobSpec:
    """Resources and configuration of a job."""

    cluster: str  # slurm, local or debug
    config: Config  # with the profile's values in its section `launch`
    profile: Profile
    ranks_per_node: int
    cores: int | None = None  # of the allocation that a job of this machine is started in

    @property
    def ranks(self) -> int:
        """World size."""
        return self.config.launch.nodes * self.ranks_per_node

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.config.launch.name or Path(self.config.run).name


def choose_cluster(launch: Launch) -> str:
    """Return where to run: "slurm", "local" or "debug".

    Raises:
        UserError: SLURM is requested and missing, or does not answer, or there can be one node or rank only.
    """
    cluster = launch.cluster
    if cluster in ("auto", "slurm"):
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        available = not missing and slurm_config() is not None
        if cluster == "slurm" and not available:
            problem = f"{', '.join(missing)} not found here" if missing else "no slurm.conf is found here"
            raise UserError(f"--launch.cluster slurm: {problem}; run this where SLURM is")
        cluster = "slurm" if available else "local"
    if cluster != "slurm" and launch.nodes > 1:
        raise UserError(f"--launch.nodes {launch.nodes} needs SLURM; here, set --launch.ranks_per_node for more ranks")
    if cluster == "debug" and launch.ranks_per_node > 1:
        raise UserError(f"--launch.ranks_per_node {launch.ranks_per_node}: --cluster debug is one process; use local")
    return cluster


def leave_job(environment: MutableMapping[str, str]) -> None:
    """Remove variables of a SLURM job or step: a new job would inherit them, and ranks here would follow them.

    This includes the rest of a set of which some were unset, and what a shell sets for srun: a profile has srun's
    options.
    """
    for name in list(environment):
        if name.startswith(_JOB_VARIABLES) and name not in _CLIENT_VARIABLES:
            del environment[name]


def allocated_cores(environment: Mapping[str, str]) -> int | None:
    """Return the CPUs on this node of the allocation in which this process was started; None outside of one.

    salloc sets those of each node, as "4(x2),2"; sbatch and srun those of the node as well.
    """
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        if (match := re.match(r"\d+", environment.get(name, ""))) and int(match[0]):
            return int(match[0])
    return None


def same_resources(jobs: list[JobSpec]) -> list[JobSpec]:
    """Give the members of a job array the same cores: those of the member with the most loader workers."""
    cores = max(job.config.data.workers for job in jobs) + _CORES_BESIDE_WORKERS
    return [
        replace(
            job,
            config=replace(config, launch=replace(config.launch, cpus_per_rank=config.launch.cpus_per_rank or cores)),
        )
        for job in jobs
        for config in [job.config]
    ]


def ranks_per_node(launch: Launch, cluster: str) -> int:
    """Return the ranks of a node; by default one per GPU, or 2 without GPUs."""
    if cluster == "debug":
        return 1
    gpus = gpu_count(launch.gpus_per_node) or (count_gpus() if cluster == "local" else 0)
    return launch.ranks_per_node or gpus or 2


def count_gpus() -> int:
    """Count this machine's visible GPUs, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return len(re.findall(r"^GPU ", listed, re.MULTILINE))


def minutes(time_limit: str) -> int:
    """Convert a time limit in SLURM's notation to minutes, rounded up.

    Raises:
        UserError: It is not a time limit.
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


def executor(spec: JobSpec, folder: Path, code: Path) -> Any:
    """Return submitit's executor with all parameters of a job.

    Args:
        spec: Job.
        folder: Folder for submitit's files and the ranks' logs.
        code: Snapshot from which the ranks import.
    """
    import submitit

    python = f"{_python(spec)} -u {shlex.quote(str(code / 'launch' / 'node.py'))}"
    # Submitit takes the first "job NUMBER" in sbatch's output, that of a greeting too.
    submitit.SlurmExecutor._get_job_id_from_submission_command = staticmethod(job_number)  # type: ignore[method-assign, assignment]
    made = submitit.AutoExecutor(folder=folder, cluster=spec.cluster, slurm_python=python, local_python=python)
    limit = minutes(spec.config.launch.time)
    made.update_parameters(name=spec.name, timeout_min=limit, tasks_per_node=spec.ranks_per_node)
    if spec.cluster == "slurm":
        made.update_parameters(**slurm_parameters(spec, folder, code))
        if spec.profile.sbatch.get("wckey", "") is None:
            made._executor.parameters["wckey"] = None  # not "submitit"; update_parameters ignores None
    return made


def cores_per_rank(config: Config) -> int:
    """Return the cores of a rank; by default as many as its loader needs."""
    return config.launch.cpus_per_rank or config.data.workers + _CORES_BESIDE_WORKERS


def slurm_parameters(spec: JobSpec, folder: Path, code: Path) -> dict[str, Any]:
    """Return the job's resources by submitit's names; arguments as of `executor`."""
    launch, profile = spec.config.launch, spec.profile
    cores = cores_per_rank(spec.config)
    return {
        "nodes": launch.nodes,
        "cpus_per_task": cores,
        "slurm_partition": launch.partition,
        "slurm_account": launch.account,
        "slurm_qos": launch.qos,
        "slurm_constraint": launch.constraint,
        "slurm_array_parallelism": launch.array or None,
        "slurm_signal_delay_s": min(launch.signal, 60 * minutes(launch.time) // 2),
        # When a rank fails, all end. Since SLURM 22.05 srun does not inherit the batch job's --cpus-per-task.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cores}", *profile.srun],
        "slurm_setup": setup_lines(profile, folder, code),
        "slurm_additional_parameters": merge_options(
            {"requeue": True}, with_gpus(profile.sbatch, launch.gpus_per_node, launch.nodes)
        ),
    }


def setup_lines(profile: Profile, folder: Path, code: Path) -> list[str]:
    """Return the batch script's lines before srun: the profile's, the environment, and the requeue logic."""
    return [
        *environment_lines(profile),
        f"unset {' '.join(_SRUN_VARIABLES)}",
        "export PYTHONSAFEPATH=1",  # else python -m imports from the working directory first
        f"export PYTHONPATH={shlex.quote(str(code))}" + '"${PYTHONPATH:+:$PYTHONPATH}"',
        *requeue.setup_lines(folder, sys.executable, code),
    ]


def environment_lines(profile: Profile) -> list[str]:
    """Return a batch script's lines of a profile: its `setup`, and its `env`."""
    return [*profile.setup, *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.env.items())]


def _python(spec: JobSpec) -> str:
    """Return the command before a python script: the ranks' interpreter, in its container if there is one."""
    profile = spec.profile
    if spec.cluster != "slurm":
        return shlex.quote(sys.executable)
    python = profile.python or ("python" if profile.contained else shlex.quote(sys.executable))
    return f"{profile.container} {python}" if profile.container else python
