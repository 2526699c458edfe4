"""Where a job runs, and its resources."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from launch.executor import (
    JobSpec,
    allocated_cores,
    choose_cluster,
    executor,
    leave_job,
    minutes,
    ranks_per_node,
    same_resources,
    setup_lines,
    slurm_parameters,
)
from launch.profiles import Profile
from shards.errors import UserError
from tests.launch.cluster import use_fake_slurm
from toolkit.config.schema import Config, Launch


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:01", 91), ("24:00:00", 1440), ("2-0", 2880), ("2-12:30", 3630), ("1-00:00:01", 1441)],
)
def test_time_limits_as_slurm_reads_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "x", "1:2:3:4", "-5", "1-"])
def test_wrong_time_limits(text):
    with pytest.raises(UserError):
        minutes(text)


def test_ranks(monkeypatch):
    launch = Launch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    assert ranks_per_node(launch, "local") == 3
    assert ranks_per_node(launch, "slurm") == 2
    assert ranks_per_node(launch, "debug") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ranks_per_node(launch, "local") == 2
    launch.gpus_per_node = 8
    assert ranks_per_node(launch, "slurm") == 8
    launch.ranks_per_node = 1
    assert ranks_per_node(launch, "local") == 1


def test_automatic_cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_cluster(Launch()) == "local"
    use_fake_slurm(monkeypatch, tmp_path / "slurm")
    assert choose_cluster(Launch()) == "slurm"
    assert choose_cluster(Launch(cluster="debug")) == "debug"
    assert choose_cluster(Launch(cluster="local")) == "local"


def test_slurm_that_is_installed_but_not_set_up_or_not_answering(monkeypatch, tmp_path):
    use_fake_slurm(monkeypatch, tmp_path / "slurm")
    scontrol = tmp_path / "slurm" / "scontrol"
    scontrol.write_text("#!/bin/bash\necho 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    assert choose_cluster(Launch()) == "local"
    with pytest.raises(UserError, match=r"no slurm\.conf is found here"):
        choose_cluster(Launch(cluster="slurm"))
    scontrol.write_text("#!/bin/bash\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match=r"SLURM does not answer .* try again later, or --cluster local"):
        choose_cluster(Launch())
    assert choose_cluster(Launch(cluster="local")) == "local"


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch(cluster="local", nodes=3), "--launch.nodes 3 needs SLURM"),
        (Launch(cluster="debug", nodes=2), "--launch.nodes 2 needs SLURM"),
        (Launch(cluster="debug", ranks_per_node=2), "--cluster debug is one process"),
    ],
)
def test_too_many_nodes_or_ranks(launch, message):
    with pytest.raises(UserError, match=message):
        choose_cluster(launch)


def job_spec(profile=None, **launch):
    config = Config(run="runs/x", launch=replace(Launch(), **launch))
    return JobSpec("slurm", config, profile or Profile(), 2)


def test_signal_comes_well_before_a_short_limit(tmp_path):
    def signal(**launch):
        return slurm_parameters(job_spec(**launch), tmp_path, tmp_path)["slurm_signal_delay_s"]

    assert signal() == 300
    assert signal(signal=60) == 60
    assert signal(time="2") == 60
    assert signal(time="1", signal=20) == 20


def run_setup(profile, folder, command, environment):
    """Output of a command after the setup lines, without those of the requeue logic."""
    lines = [line for line in setup_lines(profile, folder, folder) if "requeue.py" not in line and "trap" not in line]
    command = ["bash", "-euc", "\n".join([*lines, command])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_setup_lines_run_in_bash(tmp_path):
    """With paths and values that need quoting."""
    folder = tmp_path / "a folder"
    profile = Profile(setup=["export FROM_SETUP=$HOME"], env={"VALUE": "a b $HOME", "NUMBER": 3})
    show = 'printf "%s\\n" "$PYTHONPATH" "$VALUE" "$NUMBER" "$FROM_SETUP"'
    environment = {**os.environ, "HOME": "/home/me", "PYTHONPATH": "/mine"}
    assert run_setup(profile, folder, show, environment) == [f"{folder}:/mine", "a b $HOME", "3", "/home/me"]
    environment.pop("PYTHONPATH")
    output = run_setup(profile, folder, show, environment)
    assert output[0] == str(folder), "an empty entry would be the working directory"


def test_members_of_an_array_have_the_same_cores():
    jobs = [job_spec(), job_spec(), job_spec()]
    for job, workers in zip(jobs, (1, 7, 2), strict=True):
        job.config.data.workers = workers
    assert [job.config.launch.cpus_per_rank for job in same_resources(jobs)] == [9, 9, 9]
    assert same_resources([job_spec(cpus_per_rank=4), job_spec()])[0].config.launch.cpus_per_rank == 4


OUTSIDE = {"HOME": "/h", "SLURM_CONF": "/etc/x", "SLURM_CLUSTERS": "big", "SBATCH_ACCOUNT": "mine", "SLURMFOO": "no"}


@pytest.mark.parametrize(
    "inside",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "8", "SLURM_ARRAY_TASK_ID": "3", "SUBMITIT_EXECUTOR": "slurm"},
        {"SLURM_JOBID": "7", "SLURM_NTASKS": "8", "SLURM_CPU_BIND": "quiet,mask_cpu:0x8", "SRUN_DEBUG": "3"},
        {"SLURM_MEM_PER_CPU": "8", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "n1"},
        {"PMI_RANK": "3", "PMI2_FD": "4", "PMIX_RANK": "3", "PMIX_NAMESPACE": "x"},
    ],
    ids=["login", "job", "job number unset", "leftovers", "mpi"],
)
def test_variables_of_an_enclosing_job_are_removed(inside):
    environment = OUTSIDE | inside
    leave_job(environment)
    assert environment == OUTSIDE


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, None),
        ({"SLURM_CONF": "/etc/x"}, None),
        ({"SLURM_JOB_CPUS_PER_NODE": "6", "SLURM_NTASKS": "6"}, 6),  # salloc -n 6
        ({"SLURM_JOB_CPUS_PER_NODE": "12(x2),4"}, 12),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "16", "SLURM_CPUS_PER_TASK": "2"}, 8),
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_ON_NODE": "", "SLURM_CPUS_PER_TASK": "3"}, 3),
    ],
)
def test_cores_of_an_allocation(environment, cores):
    assert allocated_cores(environment) == cores


@pytest.mark.parametrize("way", ["inherited", "setup", "env"])
def test_variables_that_hide_the_environment_do_not_reach_srun(tmp_path, way):
    hiding = dict.fromkeys(("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SBATCH_EXPORT", "SLURM_LABELIO"), "NONE")
    exports = [f"export {name}={value}" for name, value in hiding.items()]
    profile = Profile(setup=exports if way == "setup" else [], env=hiding if way == "env" else {})
    output = run_setup(profile, tmp_path, "env", {**os.environ, **(hiding if way == "inherited" else {})})
    assert f"PYTHONPATH={tmp_path}" in "\n".join(output)
    assert not [line for line in output if line.partition("=")[0] in hiding]


@pytest.mark.parametrize(
    ("profile", "before"),
    [
        (Profile(), shlex.quote(sys.executable)),
        (Profile(python="/opt/python"), "/opt/python"),
        (Profile(container="apptainer exec --nv i.sif"), "apptainer exec --nv i.sif python"),
        (Profile(container="apptainer exec i.sif", python="python3.12"), "apptainer exec i.sif python3.12"),
        (Profile(srun=["--container-image=i.sqsh"]), "--container-image=i.sqsh python"),
    ],
)
def test_which_python_the_ranks_run(tmp_path, monkeypatch, profile, before):
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    made = executor(job_spec(profile), tmp_path, tmp_path)._executor
    script = made._make_submission_file_text(made._submitit_command_str, "x")
    assert f"{before} -u {tmp_path}/launch/node.py -u -m submitit.core._submit {tmp_path}\n" in script
    assert f"\n{sys.executable} {tmp_path}/launch/slurm/requeue.py" in script, (
        "the batch script itself is not in the container"
    )
