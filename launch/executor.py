"""Where a job runs and what is asked of it there: SLURM, this machine, or this process."""

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

from launch.profiles import Profile, slurm_config
from launch.slurm import requeue
from launch.slurm.client import job_number
from launch.slurm.sbatch_options import beside, with_gpus
from shards.errors import UserError
from toolkit.config.schema import Config, Launch, gpu_count

TOOLS = ("sbatch", "srun", "squeue", "scontrol")
_BESIDE = 2  # cores of a rank on SLURM, beside those of its loader's workers
_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMI2_", "PMIX_")
# What SLURM's commands need to find a cluster and to be let in, and how they print times; all else is a job's.
_OF_CLIENTS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
# sbatch tells srun what it was told itself, by --export or SBATCH_EXPORT: NONE would keep from the ranks what the batch
# script has set for them. A label before each line would hide what the ranks say.
_OF_SRUN = ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SBATCH_EXPORT", "SLURM_LABELIO")


@dataclass(frozen=True)
class JobSpec:
    """A job as it is handed over, apart from what each rank does."""

    cluster: str  # slurm, local or debug
    config: Config  # its section `launch` with the profile's values filled in
    profile: Profile
    ranks_per_node: int
    cores: int | None = None  # of the allocation that a job of this machine is started in

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.config.launch.nodes * self.ranks_per_node

    @property
    def name(self) -> str:
        """Of the job."""
        return self.config.launch.name or Path(self.config.run).name


def choose_cluster(launch: Launch) -> str:
    """Where to run: "slurm", "local" or "debug".

    Raises:
        UserError: SLURM is asked for and not there, or does not answer, or there can be one node or rank only.
    """
    cluster = launch.cluster
    if cluster in ("auto", "slurm"):
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        there = not missing and slurm_config() is not None
        if cluster == "slurm" and not there:
            what = f"{', '.join(missing)} not found here" if missing else "no slurm.conf is found here"
            raise UserError(f"--launch.cluster slurm: {what}; run this where SLURM is")
        cluster = "slurm" if there else "local"
    if cluster != "slurm" and launch.nodes > 1:
        raise UserError(f"--launch.nodes {launch.nodes} needs SLURM; here, set --launch.ranks_per_node for more ranks")
    if cluster == "debug" and launch.ranks_per_node > 1:
        raise UserError(f"--launch.ranks_per_node {launch.ranks_per_node}: --cluster debug is one process; take local")
    return cluster


def leave_job(environment: MutableMapping[str, str]) -> None:
    """Drop what a job or step of SLURM has set: sbatch would hand it on to a new job, and ranks here would heed it.

    Of a job that was left in part, with some variables unset, the others go too. What a shell sets for srun goes as
    well: what a job asks of srun is in its profile.
    """
    for name in list(environment):
        if name.startswith(_OF_JOBS) and name not in _OF_CLIENTS:
            del environment[name]


def allocated_cores(environment: Mapping[str, str]) -> int | None:
    """CPUs on this node of the allocation that this process was started in; None outside of any.

    salloc names those of each node, as "4(x2),2"; sbatch and srun those of the node as well.
    """
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        if (match := re.match(r"\d+", environment.get(name, ""))) and int(match[0]):
            return int(match[0])
    return None


def same_resources(jobs: list[JobSpec]) -> list[JobSpec]:
    """The members of a job array, which asks for the same for each: cores for the one that has most loader workers."""
    most = max(job.config.data.workers for job in jobs) + _BESIDE
    return [
        replace(
            job,
            config=replace(config, launch=replace(config.launch, cpus_per_rank=config.launch.cpus_per_rank or most)),
        )
        for job in jobs
        for config in [job.config]
    ]


def ranks_per_node(launch: Launch, cluster: str) -> int:
    """One rank a GPU, or 2 where there is none, if the configuration does not say."""
    if cluster == "debug":
        return 1
    gpus = gpu_count(launch.gpus_per_node) or (count_gpus() if cluster == "local" else 0)
    return launch.ranks_per_node or gpus or 2


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


def executor(asked: JobSpec, folder: Path, code: Path) -> Any:
    """Submitit's executor with everything that this job asks for.

    Args:
        asked: The job.
        folder: For submitit's files and the ranks' logs.
        code: The snapshot that the ranks import from.
    """
    import submitit

    python = f"{_python(asked)} -u {shlex.quote(str(code / 'launch' / 'node.py'))}"
    # Submitit takes the first "job NUMBER" of whatever sbatch prints, a greeting's too.
    submitit.SlurmExecutor._get_job_id_from_submission_command = staticmethod(job_number)  # type: ignore[method-assign, assignment]
    made = submitit.AutoExecutor(folder=folder, cluster=asked.cluster, slurm_python=python, local_python=python)
    limit = minutes(asked.config.launch.time)
    made.update_parameters(name=asked.name, timeout_min=limit, tasks_per_node=asked.ranks_per_node)
    if asked.cluster == "slurm":
        made.update_parameters(**slurm_parameters(asked, folder, code))
        if asked.profile.sbatch.get("wckey", "") is None:
            made._executor.parameters["wckey"] = None  # not "submitit"; update_parameters passes over None
    return made


def cores_per_rank(config: Config) -> int:
    """Cores that a rank asks SLURM for, if the configuration does not say as many as its loader needs."""
    return config.launch.cpus_per_rank or config.data.workers + _BESIDE


def slurm_parameters(asked: JobSpec, folder: Path, code: Path) -> dict[str, Any]:
    """What is asked of SLURM, in submitit's names; arguments as of `executor`."""
    launch, profile = asked.config.launch, asked.profile
    cores = cores_per_rank(asked.config)
    return {
        "nodes": launch.nodes,
        "cpus_per_task": cores,
        "slurm_partition": launch.partition,
        "slurm_account": launch.account,
        "slurm_qos": launch.qos,
        "slurm_constraint": launch.constraint,
        "slurm_array_parallelism": launch.array or None,
        "slurm_signal_delay_s": min(launch.signal, 60 * minutes(launch.time) // 2),
        # When a rank fails all end; and srun does not take over the batch job's --cpus-per-task since SLURM 22.05.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cores}", *profile.srun],
        "slurm_setup": setup_lines(profile, folder, code),
        "slurm_additional_parameters": beside(
            {"requeue": True}, with_gpus(profile.sbatch, launch.gpus_per_node, launch.nodes)
        ),
    }


def setup_lines(profile: Profile, folder: Path, code: Path) -> list[str]:
    """The batch script's lines before srun: the cluster's own, the environment, and what happens when it ends."""
    return [
        *profile.setup,
        *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.env.items()),
        f"unset {' '.join(_OF_SRUN)}",
        "export PYTHONSAFEPATH=1",  # else python -m looks for packages in the working directory first
        f"export PYTHONPATH={shlex.quote(str(code))}" + '"${PYTHONPATH:+:$PYTHONPATH}"',
        *requeue.setup_lines(folder, sys.executable, code),
    ]


def _python(asked: JobSpec) -> str:
    """The command before a python script: the ranks' interpreter, in its container if it has one."""
    profile = asked.profile
    if asked.cluster != "slurm":
        return shlex.quote(sys.executable)
    python = profile.python or ("python" if profile.contained else shlex.quote(sys.executable))
    return f"{profile.container} {python}" if profile.container else python
