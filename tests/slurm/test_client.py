"""Every query of the launcher on a real SLURM, with accounts, QOS and limits that are set here.

The stubs of tests/launch answer in the same form.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.preflight import checks, limits
from launch.slurm.client import find_jobs, job_number, query, queued_jobs, slurm_config, submit_script
from launch.slurm.sbatch_options import directive, read_options, with_gpus
from launch.status.follow import Slurm
from shards.errors import UserError
from tests.launch.cluster import check_limits, job_spec, use_fake_slurm
from tests.slurm.cluster import GPUS, NODES, Cluster, wait_for

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(300)]
TOOLS = ("sacctmgr", "scontrol", "squeue", "sacct", "sinfo", "sbatch", "scancel")
ADDED = """
add account Speech cluster=testbed
add account sub parent=speech
add account Vision cluster=testbed
add user root account=speech,sub
add qos Short set MaxWall=01:00:00 MaxTRESPerJob=node=2
add qos few set GrpTRES=gres/gpu=3
add qos mine set MaxTRESPerUser=cpu=3
add qos lifted set flags=PartitionTimeLimit,PartitionMaxNodes
add qos wide set MaxWall=5-0 MaxTRESPerJob=node=8
add qos ofpart set MaxWall=00:10:00
add qos stronger set flags=OverPartQOS MaxWall=03:00:00
add qos other
modify user root set qos+=short,few,mine,lifted,wide,stronger
modify account speech set MaxWall=2-0 MaxTRESPerJob=node=6 GrpTRES=cpu=8
"""
PARTITIONS = {
    "timed": "MaxTime=01:00:00",
    "small": "MaxNodes=2",
    "large": "MinNodes=3",
    "down": "State=DOWN",
    "drained": "State=DRAIN",
    "inactive": "State=INACTIVE",
    "limited": "QoS=ofpart",
}


@pytest.fixture(scope="module")
def accounts(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with accounts, QOS, limits and partitions; nothing of them is left afterwards."""
    for line in ADDED.strip().splitlines():
        cluster.run("sacctmgr", "--immediate", *line.split())
    for name, what in PARTITIONS.items():
        cluster.run("scontrol", "create", f"PartitionName={name}", "Nodes=ALL", *what.split())
    cluster.run("scontrol", "update", "NodeName=node1", "Features=a100,ib")
    wait_for(lambda: "wide" in cluster.run("scontrol", "show", "assoc_mgr", "flags=qos").stdout, lambda: "no QOS")
    yield cluster
    cluster.run("scancel", "--user=root", "--full")
    wait_for(lambda: not cluster.run("squeue", "--noheader").stdout, lambda: cluster.run("squeue").stdout)
    cluster.run("scontrol", "update", "NodeName=node1", "ActiveFeatures=", "AvailableFeatures=")
    for name in PARTITIONS:
        cluster.run("scontrol", "delete", f"PartitionName={name}")
    qos = "short,few,mine,lifted,wide,ofpart,stronger,other"
    cluster.run("sacctmgr", "--immediate", "delete", "user", "root", "account=sub,speech", expect=None)
    cluster.run("sacctmgr", "--immediate", "delete", "account", "sub,speech,vision", expect=None)
    cluster.run("sacctmgr", "--immediate", "delete", "qos", *qos.split(","), expect=None)


@pytest.fixture
def real(accounts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """SLURM's commands for this process, which is no client of the cluster, once all nodes answer."""
    accounts.resume()
    wait_for(accounts.idle, lambda: accounts.run("sinfo", "-R").stdout)
    folder = tmp_path / "real"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).write_text(f'#!/bin/sh\nexec {accounts.folder}/bin/in-cluster {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return accounts


def submit(*arguments: str) -> str:
    """Submit a job that does nothing, without checks."""
    command = ["sbatch", *arguments, "--output=/dev/null", "--wrap=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return job_number(done.stdout)


def test_the_configuration_of_slurm(real: Cluster) -> None:
    config = slurm_config()
    assert config is not None
    assert config["ClusterName"] == "testbed"
    assert config["AccountingStorageEnforce"] == "associations,limits,qos"
    assert re.fullmatch(r"\d+ sec", config["KillWait"])
    assert limits.enforced()


def test_names_of_accounts_and_qos(real: Cluster) -> None:
    assert limits.names("account") == ["root", "speech", "sub", "vision"]
    assert {"normal", "short", "few", "wide"} <= set(limits.names("qos"))
    for name in ("speech", "SPEECH", "Speech", "Vision", "speech,sub"):
        assert checks.check_exists("account", name) == f"{name} in SLURM's accounting"
    for name in ("normal", "SHORT", "short,Few"):
        assert checks.check_exists("qos", name) == f"{name} in SLURM's accounting"
    for kind, name in (("account", "nosuch"), ("account", "speech,nosuch"), ("qos", "nosuch"), ("account", "speec")):
        with pytest.raises(UserError, match=rf"--{kind} {name.split(',')[-1]}: SLURM has no such {kind}; there are"):
            checks.check_exists(kind, name)


@pytest.mark.parametrize(("option", "taken"), [
    ("--account=SPEECH", True), ("--account=speech", True), ("--account=vision", False), ("--account=nosuch", False),
    ("--qos=SHORT", True), ("--qos=other", False), ("--qos=nosuch", False), ("--partition=LOW", False),
])  # fmt: skip
def test_sbatch_compares_names_the_same_way(real: Cluster, option: str, taken: bool) -> None:
    script = f"#!/bin/bash\n#SBATCH {option}\ntrue\n"
    if taken:
        assert re.match(r"Job \d+ to start at ", checks.check_script(script))
        return
    for only_permanent in (False, True):
        with pytest.raises(UserError, match=r"SLURM would not run the job: .*[Ii]nvalid"):
            checks.check_script(script, only_permanent)


# Requested resources, the reason for which SLURM itself would let the job wait forever, and the message.
_NODES = "PartitionConfig or PartitionNodeLimit"  # by which of SLURM's schedulers considers the job first
ABOVE = [
    ({"qos": "short", "time": "2:00:00"}, "QOSMaxWallDurationPerJobLimit",
     "QOS short limits a job to 01:00:00, --time is 2:00:00"),
    ({"qos": "SHORT", "nodes": 3}, "QOSMaxNodePerJobLimit",
     "QOS SHORT limits a job to node=2, this job requests 3: set --nodes"),
    ({"qos": "few", "nodes": 2, "gpus_per_node": 2}, "QOSGrpGRES",
     "QOS few limits all jobs to gres/gpu=3, this job requests 4: set --nodes or --gpus-per-node"),
    ({"qos": "few", "nodes": 2, "gpus_per_node": "a100:2"}, "QOSGrpGRES", "QOS few limits all jobs to gres/gpu=3"),
    ({"qos": "mine", "nodes": 4}, "QOSMaxCpuPerUserLimit", "QOS mine limits a user to cpu=3, this job requests 4"),
    ({"account": "speech", "nodes": 7}, "AssocMaxNodePerJobLimit",
     "user root with account speech limits a job to node=6, this job requests 7"),
    ({"account": "Speech", "time": "3-0"}, "AssocMaxWallDurationPerJobLimit",
     "user root with account Speech limits a job to 2-00:00:00, --time is 3-0"),
    ({"account": "speech", "nodes": 5, "ranks": 2}, "AssocGrpCpuLimit", "account speech limits all jobs to cpu=8"),
    ({"account": "sub", "nodes": 5, "ranks": 2}, "AssocGrpCpuLimit", "account speech limits all jobs to cpu=8"),
    ({"partition": "limited", "time": "20"}, "QOSMaxWallDurationPerJobLimit", "QOS ofpart limits a job to 00:10:00"),
    ({"partition": "timed", "time": "2:00:00"}, "PartitionConfig", "partition timed limits a job to 01:00:00"),
    ({"partition": "small", "nodes": 3}, _NODES, "partition small allows at most 2 nodes a job"),
    ({"partition": "large", "nodes": 2}, _NODES, "partition large allows at least 3 nodes a job"),
    ({"partition": "down"}, "PartitionDown", "partition down is DOWN"),
]  # fmt: skip
WITHIN = [
    {},
    {"nodes": NODES, "ranks": 2},
    {"qos": "short", "nodes": 2, "time": "1:00:00"},
    {"qos": "few", "nodes": 1, "gpus_per_node": GPUS},
    {"account": "speech", "nodes": 6, "time": "2-0"},
    {"account": "speech", "qos": "wide", "nodes": 7, "time": "3-0"},  # the QOS counts, not the account
    {"partition": "timed", "qos": "lifted", "time": "2:00:00"},
    {"partition": "small", "qos": "lifted", "nodes": 3},
    {"partition": "limited", "qos": "stronger", "time": "20"},
    {"partition": "timed,low", "time": "2:00:00"},
    {"partition": "large", "nodes": 3},
]


def options(launch: dict[str, object]) -> list[str]:
    """The same as options of sbatch."""
    names = {"ranks": "ntasks-per-node", "gpus_per_node": "gpus-per-node"}
    words = [f"--{names.get(name, name)}={value}" for name, value in launch.items()]
    return words + ["--time=10"] * ("time" not in launch)


@pytest.mark.parametrize(("launch", "reason", "message"), ABOVE)
def test_above_a_limit(real: Cluster, launch: dict[str, object], reason: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_limits(**launch)
    assert message in str(caught.value)
    number = submit(*options(launch))
    try:
        output = wait_for(lambda: waits(number), lambda: real.run("squeue").stdout, 60)
        assert output in reason.split(" or ")
    finally:
        real.run("scancel", number)


def waits(job: str) -> str:
    """Why a job waits, once SLURM has scheduled."""
    found = find_jobs([job])[job]
    assert found.state in ("PENDING", ""), f"SLURM runs it: {found}"
    return found.reason if found.reason not in ("", "Priority", "Resources") else ""


@pytest.mark.parametrize("launch", WITHIN)
def test_within_all_limits(real: Cluster, launch: dict[str, object]) -> None:
    assert check_limits(**launch) == "within those of QOS, user and account"
    number = submit(*options(launch))
    wait_for(lambda: real.state(number) == "COMPLETED", lambda: real.run("squeue").stdout, 60)


@pytest.mark.parametrize("name", ["drained", "inactive", "nosuch"])
def test_partitions_that_take_no_job(real: Cluster, name: str) -> None:
    with pytest.raises(UserError, match=r"partition drained is DRAIN|partition inactive is INACTIVE|no such partition"):
        checks.check_partition(job_spec(partition=name))
    with pytest.raises(UserError, match=r"Required partition not available|[Ii]nvalid partition"):
        checks.check_script(f"#!/bin/bash\n#SBATCH --partition={name}\ntrue\n")


@pytest.mark.parametrize(
    "option", ["--constraint=nosuch", "--gpus-per-node=3", "--gpus-per-node=h100:1", "--cpus-per-task=3"]
)
def test_resources_that_no_node_has(real: Cluster, option: str) -> None:
    with pytest.raises(
        UserError, match=r"SLURM would not run the job: .*(Requested node configuration|Invalid feature)"
    ):
        checks.check_script(f"#!/bin/bash\n#SBATCH {option}\ntrue\n", only_permanent=True)


@pytest.mark.parametrize(
    "option", ["--constraint=a100&ib", "--gpus-per-node=2", "--gpus-per-node=a100:2", "--gres=gpu:a100:2"]
)
def test_resources_that_a_node_has(real: Cluster, option: str) -> None:
    assert "to start at" in checks.check_script(f"#!/bin/bash\n#SBATCH '{option}'\ntrue\n", only_permanent=True)


def test_unavailable_nodes(real: Cluster) -> None:
    """sbatch --test-only calls a job on them impossible, and sbatch takes it."""
    assert limits.unavailable_nodes([]) == limits.unavailable_nodes(["low,high"]) == []
    script = f"#!/bin/bash\n#SBATCH --nodes={NODES}\n#SBATCH --output=/dev/null\ntrue\n"
    real.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        assert (
            limits.unavailable_nodes([])
            == limits.unavailable_nodes(["low"])
            == limits.unavailable_nodes(["low,high"])
            == ["node2"]
        )
        assert "Requested node configuration is not available" in checks.check_script(script, only_permanent=True)
        with pytest.raises(UserError, match=r"would not run the job now: .* it may once node2 can be used again"):
            checks.check_script(script)
        job = submit(f"--nodes={NODES}")
    finally:
        real.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    wait_for(lambda: real.state(job) == "COMPLETED", lambda: real.run("squeue").stdout, 60)


def test_the_queue_and_the_accounts_of_jobs(real: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    waiting, array = submit("--hold"), submit("--hold", "--array=0-2")
    found = find_jobs([waiting, f"{array}_1", "999999"])
    assert (found[waiting].state, found[waiting].reason, found[waiting].alive) == ("PENDING", "JobHeldUser", True)
    assert found[f"{array}_1"].alive
    assert not found["999999"].alive
    followed = Slurm(waiting)
    assert followed.alive()
    assert f"job {waiting}: PENDING (JobHeldUser)\n" in capsys.readouterr().out
    real.run("scancel", waiting, f"{array}_1")
    assert set(queued_jobs([waiting, f"{array}_0", f"{array}_1"]) or {}) == {f"{array}_0"}
    followed.queried_at = -60.0
    assert not followed.alive()
    real.run("scancel", array)
    ended = {waiting, f"{array}_0", f"{array}_2"}  # of the member that was cancelled alone SLURM knows nothing
    wait_for(
        lambda: {job for job, each in find_jobs(ended).items() if each.state == "CANCELLED"} == ended, lambda: "", 60
    )
    assert not any(each.alive for each in find_jobs([*ended, f"{array}_1"]).values())


@pytest.mark.parametrize("more", [(), ("--parsable",), ("--clusters=testbed",), ("--parsable", "--clusters=testbed")])
@pytest.mark.parametrize("array", [(), ("--array=0-1",)])
def test_the_number_of_a_job(real: Cluster, more: tuple[str, ...], array: tuple[str, ...]) -> None:
    job = submit("--hold", *more, *array)
    assert job in (query(["squeue", "--noheader", "--format=%A"]) or [])
    real.run("scancel", job)


@pytest.mark.parametrize(("section", "seen"), [
    ({}, {"0,1"}), ({"gres": "gpu:2"}, {"0,1"}), ({"gres": "gpu:a100:2"}, {"0,1"}), ({"gpus": 2}, {"0,1"}),
    ({"gpus": "a100:2"}, {"0,1"}),
])  # fmt: skip
def test_each_rank_sees_all_gpus_of_its_node(
    real: Cluster, tmp_path: Path, section: dict[str, object], seen: set[str]
) -> None:
    gpus = with_gpus(read_options(section, "sbatch"), GPUS if "a100" in str(section) else 2, 1)
    assert visible(real, tmp_path, [directive(*each) for each in gpus.items()]) == seen


@pytest.mark.parametrize("option", ["--gpus-per-task=1", "--gpus-per-node=2 --gpu-bind=single:1"])
def test_options_by_which_a_rank_sees_one_gpu(real: Cluster, tmp_path: Path, option: str) -> None:
    """Why they are refused: ranks take the GPU of their number."""
    assert visible(real, tmp_path, [f"#SBATCH {word}" for word in option.split()]) == {"0", "1"}


def visible(cluster: Cluster, folder: Path, lines: list[str]) -> set[str]:
    """CUDA_VISIBLE_DEVICES of the two tasks of a job."""
    head = ["#!/bin/bash", "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=2", f"#SBATCH --output={folder}/out", *lines]
    (folder / "job.sh").write_text("\n".join([*head, "srun printenv CUDA_VISIBLE_DEVICES", ""]))
    job = submit_script(folder / "job.sh")
    wait_for(lambda: cluster.state(job) == "COMPLETED", lambda: (folder / "out").read_text(), 60)
    return set((folder / "out").read_text().split())


def test_values_arrive_as_they_are_written(real: Cluster, tmp_path: Path) -> None:
    values = {
        "comment": 'it\'s a #1 "test" $HOME',
        "mail_type": ["END", "FAIL"],
        "--mem": "50M",
        "x": "node1",
        "hold": True,
    }
    lines = [directive(*each) for each in read_options(values, "sbatch").items()]
    (tmp_path / "job.sh").write_text("\n".join(["#!/bin/bash", *lines, "true", ""]))
    job = submit_script(tmp_path / "job.sh")
    shown = real.run("scontrol", "show", "job", job).stdout
    real.run("scancel", job)
    for part in (
        'Comment=it\'s a #1 "test" $HOME ',
        "MailType=END,FAIL",
        "MinMemoryNode=50M",
        "ExcNodeList=node1",
        "JobHeldUser",
    ):
        assert part in shown, part


QUESTIONS = [
    "scontrol show config",
    "scontrol show partition --oneliner",
    "sacctmgr --noheader --parsable2 --readonly list account format=account",
    "sacctmgr --noheader --parsable2 --readonly list account format=name",
    "sacctmgr --noheader --parsable2 --readonly list account format=account,name",
    "sacctmgr --noheader --parsable2 --readonly list qos format=name",
    f"sacctmgr --noheader --parsable2 --readonly list qos where name=normal format={','.join(limits._QOS)}",
    "sacctmgr --noheader --parsable2 --readonly list user where name=root format=defaultaccount",
    "sacctmgr --noheader --parsable2 --readonly list association where account=speech cluster=testbed "
    f"format={','.join(limits._ASSOCIATION)}",
    "sinfo --noheader --Node --format=%N|%P|%T",
    "squeue --noheader --jobs 999999 --format %T",
]


def shape(question: str, answer: subprocess.CompletedProcess[str]) -> tuple[int, set[object]]:
    """The form of an answer: its exit code, and of each line the keys, or which of how many columns are blank."""
    lines = answer.stdout.splitlines()
    if question == "scontrol show config":
        return answer.returncode, {line.partition("=")[0].strip() for line in lines if " = " in line}
    if question.startswith("scontrol"):
        return answer.returncode, {word.partition("=")[0] for line in lines for word in line.split() if "=" in word}
    blank = [[not part for part in line.split("|")] for line in lines]
    always = [all(column) for column in zip(*blank, strict=True)]
    return answer.returncode, {json.dumps(always[:1]), len(always)}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_stub_answers_in_the_same_form(
    real: Cluster, tmp_path: Path, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = subprocess.run(question.split(" "), capture_output=True, text=True)
    use_fake_slurm(monkeypatch, tmp_path / "stubs", "testbed")
    code, form = shape(question, ours)
    its_code, its_form = shape(question, subprocess.run(question.split(" "), capture_output=True, text=True))
    assert its_code == code
    if question.startswith("scontrol"):
        assert its_form <= form, "keys that SLURM does not have"
    else:
        assert its_form == form
    assert form or "999999" in question


def test_the_stub_submits_in_the_same_words(real: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --begin=now+1hour\ntrue\n")

    def words() -> list[str]:
        output = [checks.check_script(script.read_text())]
        output.append(subprocess.run(["sbatch", script], capture_output=True, text=True).stdout)
        return [re.sub(r"\d+|node[\[\]\d,-]+", "N", re.sub(r"\S+T\d\S+", "TIME", each)) for each in output]

    ours, since = words(), time.time()
    job = query(["squeue", "--noheader", "--format=%A"]) or []
    real.run("scancel", *job)
    use_fake_slurm(monkeypatch, tmp_path / "stubs")
    assert words() == ours
    assert time.time() - since < 60
