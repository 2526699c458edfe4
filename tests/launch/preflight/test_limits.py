"""Limits of partitions and accounting, from stubs of SLURM's commands; tests/slurm has the real ones."""

import getpass

import pytest

from launch.preflight import checks, limits
from shards.errors import UserError
from tests.launch.cluster import check_limits, use_fake_slurm

QOS = """\
name|flags|maxwall|maxtresperjob|maxtresperuser|maxtresperaccount|grptres
normal||||||
short||01:00:00|node=2,mem=4G|||
users||||cpu=3||
accounts|||||cpu=5|
group||||||gres/gpu=3,gres/gpu:a100=2
lifted|PartitionTimeLimit,PartitionMaxNodes|||||
part|DenyOnLimit|00:10:00||||
over|OverPartQOS|2-0||||
"""
ASSOCIATIONS = """\
cluster|account|user|partition|parentname|defaultqos|maxwall|maxtresperjob|grptres
testbed|root|||||||
testbed|Speech|||root|short|2-00:00:00|node=3|cpu=8
testbed|Speech|ME||||2-00:00:00|node=3|
testbed|Speech|ME|big|||4-00:00:00|node=3|
testbed|sub|||speech|||node=5|
testbed|sub|ME|||normal|||
testbed|sub|another|||normal|00:01:00||
elsewhere|sub|ME||||00:02:00||
"""
PARTITIONS = """\
PartitionName=low Default=YES MaxNodes=UNLIMITED MinNodes=0 MaxTime=UNLIMITED State=UP TotalNodes=9 QoS=N/A
PartitionName=big Default=NO MaxNodes=UNLIMITED MinNodes=2 MaxTime=UNLIMITED State=UP TotalNodes=9 QoS=N/A
PartitionName=short Default=NO MaxNodes=2 MaxTime=01:00:00 State=UP TotalNodes=9 QoS=N/A
PartitionName=limited Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=9 QoS=part
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that enforces the limits above; the folder of its stubs."""
    use_fake_slurm(monkeypatch, tmp_path / "slurm", "testbed", "associations,limits,qos")
    folder = tmp_path / "slurm"
    (folder / "qos").write_text(QOS)
    (folder / "association").write_text(ASSOCIATIONS.replace("ME", getpass.getuser()))
    (folder / "user").write_text(f"name|defaultaccount\n{getpass.getuser()}|root\nanother|sub\n")
    (folder / "partitions").write_text(PARTITIONS)
    return folder


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"qos": "short", "time": "61"}, "QOS short limits a job to 01:00:00, --time is 61"),
        ({"qos": "SHORT", "nodes": 3}, "QOS SHORT limits a job to node=2, this job requests 3: set --nodes"),
        ({"qos": "users", "ranks": 4}, "QOS users limits a user to cpu=3, this job requests 4"),
        ({"qos": "users", "ranks": 2, "cpus_per_rank": 2}, "QOS users limits a user to cpu=3, this job requests 4"),
        ({"qos": "accounts", "nodes": 2, "ranks": 3}, "QOS accounts limits an account to cpu=5"),
        ({"qos": "group", "gpus_per_node": 4}, "QOS group limits all jobs to gres/gpu=3, this job requests 4"),
        ({"qos": "group", "nodes": 2, "gpus_per_node": 2}, "gres/gpu=3, this job requests 4: set --nodes or --gpus-"),
        ({"qos": "group", "gpus_per_node": "a100:3"}, "QOS group limits all jobs to gres/gpu:a100=2"),
        ({"account": "speech", "qos": "normal", "nodes": 4}, "with account speech limits a job to node=3"),
        ({"account": "SPEECH", "qos": "normal", "time": "3-0"}, "limits a job to 2-00:00:00, --time is 3-0"),
        ({"account": "speech", "time": "61"}, "QOS short limits a job to 01:00:00"),  # the account's default QOS
        ({"account": "sub", "nodes": 6}, "account sub limits a job to node=5"),
        ({"account": "sub", "nodes": 3, "ranks": 3}, "account speech limits all jobs to cpu=8"),
        ({"partition": "limited", "time": "11"}, "QOS part limits a job to 00:10:00"),
        ({"partition": "big", "nodes": 1}, "partition big allows at least 2 nodes a job, --nodes is 1"),
        ({"partition": "short", "nodes": 3}, "partition short allows at most 2 nodes a job"),
        ({"partition": "short", "qos": "short", "time": "61"}, "partition short limits a job to 01:00:00"),
        ({"partition": "short,limited", "time": "61"}, "QOS part limits a job to 00:10:00"),
    ],
)
def test_above_a_limit(slurm, launch, message):
    if launch.get("partition") == "short,limited":
        longer = PARTITIONS.replace("MaxTime=01:00:00", "MaxTime=2:00:00").replace("QoS=N/A", "QoS=part")
        (slurm / "partitions").write_text(longer)
    with pytest.raises(UserError) as caught:
        check_limits(**launch)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "launch",
    [
        {},
        {"time": "30-0", "nodes": 9, "ranks": 8},
        {"qos": "short", "nodes": 2, "time": "1:00:00"},
        {"qos": "group", "gpus_per_node": "a100:2"},
        {"account": "speech", "nodes": 2},
        {"account": "speech", "qos": "normal", "partition": "big", "nodes": 2, "time": "3-0"},  # limits of a partition
        {"account": "sub", "time": "2-0"},
        {"partition": "limited", "qos": "over", "time": "1-0"},
        {"partition": "short", "qos": "lifted", "time": "2:00:00", "nodes": 3},
        {"partition": "limited,low", "time": "20"},
        {"qos": "short,group", "time": "2:00:00"},  # SLURM chooses among several
        {"account": "nosuch"},
    ],
)
def test_within_all_limits(slurm, launch):
    assert check_limits(**launch) == "within those of QOS, user and account"


@pytest.mark.parametrize("enforce", ["none", "associations", "associations,qos", ""])
def test_limits_that_are_not_enforced(slurm, monkeypatch, enforce):
    monkeypatch.setenv("STUB_ENFORCE", enforce)
    assert check_limits(qos="short", nodes=3) == "SLURM enforces none"


@pytest.mark.parametrize(
    "answer", ["exit 1", "echo 'sacctmgr: error: Connection refused' >&2; exit 1", "echo", "echo '|'"]
)
def test_without_accounting_nothing_is_refused(slurm, answer):
    (slurm / "sacctmgr").write_text(f"#!/bin/bash\n{answer}\n")
    assert check_limits(qos="short", nodes=3, account="speech") == "within those of QOS, user and account"
    assert limits.names("account") == limits.names("qos") == []
    assert checks.check_exists("account", "speech") == "not checked: no accounting"


@pytest.mark.parametrize("name", ["speech", "SPEECH", "Speech,root"])
def test_accounts_are_compared_without_case(slurm, name):
    assert checks.check_exists("account", name) == f"{name} in SLURM's accounting"


USABLE = "idle mixed allocated completing planned powered_down powering_up idle~ mixed# mixed- allocated+ idle%"
AWAY = "down down* drained draining drained* unknown idle* maint reserved fail failing idle$ mixed@ inval blocked"


@pytest.mark.parametrize("state", [*USABLE.split(), *AWAY.split()])
def test_unavailable_nodes(slurm, state):
    sinfo = f"#!/bin/bash\necho 'node1|low*|idle'; echo 'node2|low*|{state}'; echo 'node2|big|{state}'\n"
    (slurm / "sinfo").write_text(sinfo)
    assert limits.unavailable_nodes([]) == limits.unavailable_nodes(["big,low"]) == ["node2"] * (state in AWAY.split())


def test_a_job_that_waits_for_nodes_is_accepted(slurm):
    script = "#!/bin/bash\n#SBATCH --partition=low\n"
    refusal = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
    (slurm / "sbatch").write_text(f"#!/bin/bash\n{refusal}\n")
    with pytest.raises(UserError, match="SLURM would not run the job: allocation failure: Requested"):
        checks.check_script(script, only_permanent=True)
    (slurm / "sinfo").write_text("#!/bin/bash\necho 'node2|low*|down*'; echo 'node3|low*|drained'\n")
    checks.check_script(script, only_permanent=True)
    with pytest.raises(UserError, match=r"not run the job now: .*; it may once node2, node3 can be used again"):
        checks.check_script(script)
    (slurm / "sinfo").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(UserError, match="SLURM would not run the job: "):
        checks.check_script(script, only_permanent=True)
