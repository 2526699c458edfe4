"""Options of sbatch in a profile: every spelling of a name, every kind of value, and the GPUs among them."""

import pytest

from launch.profiles import read_profile
from launch.slurm.sbatch_options import check_srun, directive, merge_options, read_options, with_gpus
from shards.errors import UserError


def read(text, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return read_profile(path)


def refused(text, tmp_path):
    with pytest.raises(UserError) as caught:
        read(text, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/p.yaml: "), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["mail-type", "mail_type", "--mail-type", "--mail_type", "-mail-type"])
def test_a_name_in_every_spelling(name):
    assert read_options({name: "END"}, "sbatch") == {"mail-type": "END"}


@pytest.mark.parametrize(("short", "name"), [("x", "exclude"), ("-w", "nodelist"), ("L", "licenses"), ("-H", "hold")])
def test_short_names(short, name):
    assert read_options({short: "a"}, "sbatch") == {name: "a"}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("true", "#SBATCH --x-y"),
        ("True", "#SBATCH --x-y"),
        ("false", None),
        ("False", None),
        ("null", None),
        ("~", None),
        ("", None),
        ("[]", None),
        ("0", "#SBATCH --x-y=0"),
        ("4G", "#SBATCH --x-y=4G"),
        ("1.10", "#SBATCH --x-y=1.10"),
        ("no", "#SBATCH --x-y=no"),
        ("24:00:00", "#SBATCH --x-y=24:00:00"),
        ("a b", "#SBATCH --x-y='a b'"),
        ("[END, FAIL]", "#SBATCH --x-y=END,FAIL"),
        ("[1, 2]", "#SBATCH --x-y=1,2"),
    ],
)
def test_values(value, line, tmp_path):
    options = merge_options({}, read(f"sbatch: {{x-y: {value}}}", tmp_path).sbatch)
    assert [directive(*each) for each in options.items()] == ([line] if line else [])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('{"a b": 1}', "'a b' is not an option of sbatch"),
        ('{"a;b": 1}', "is not an option of sbatch"),
        ('{"": 1}', "is not an option of sbatch"),
        ("{--: 1}", "is not an option of sbatch"),
        ("{Mem: 1}", "is not an option of sbatch"),
        ("{1: 2}", "is not an option of sbatch"),
        ("{z: 2}", "is not an option of sbatch"),
        ('{"mem=4G": true}', "is not an option of sbatch"),
        ("{comment: {a: 1}}", "sbatch.comment is {'a': 1}; expected"),
        ("{mail-type: [END, null]}", "expected a list of words or numbers"),
        ("{mail-type: [END, [FAIL]]}", "expected a list of words or numbers"),
        ('{comment: "a\\n#SBATCH --nodes=9"}', "expected one line"),
        ("{mail-type: END, mail_type: FAIL}", "is given twice, as mail-type too"),
        ("{x: a, exclude: b}", "is given twice, as x too"),
        ("{requeue: maybe}", "expected true, false or null"),
        ("{requeue: true, no-requeue: true}", "both --requeue and --no-requeue"),
        ("{no_requeue: false, requeue: false}", "both --requeue and --no-requeue"),
        ("[exclusive]", "sbatch is ['exclusive']; expected mapping"),
    ],
)
def test_invalid_options(section, message, tmp_path):
    assert message in refused(f"sbatch: {section}", tmp_path)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ("nodes N --nodes -N nod", "nodes"),
        ("ntasks n -n ntask", "ranks_per_node"),
        ("ntasks-per-node ntasks_per_node tasks-per-node ntasks-per-n", "ranks_per_node"),
        ("ntasks-per-gpu", "ranks_per_node"),
        ("cpus-per-task cpus_per_task c cpus-per-gpu", "cpus_per_rank"),
        ("time t tim", "time"),
        ("partition p part", "partition"),
        ("account A -A acc", "account"),
        ("qos q", "qos"),
        ("constraint C", "constraint"),
        ("signal", "signal"),
        ("array a -a", "array"),
        ("gpus-per-node gpus_per_node --gpus-per-node gpus-per-socket", "gpus_per_node"),
        ("gpus-per-task gpus_per_task", "gpus_per_node"),
        ("job-name J", "--name"),
        ("output o error e input i open-mode", "run folder"),
        ("chdir D", "working directory of the command"),
        ("clusters M cluster", "SLURM_CLUSTERS"),
        ("wait W quiet Q parsable", "answer"),
        ("test-only wrap", "--dry-run"),
        ("help h usage version V", "nothing would be submitted"),
    ],
)
def test_options_of_the_launcher_are_refused_with_what_to_do(names, key, tmp_path):
    for name in names.split():
        message = refused(f"sbatch: {{{name}: 3}}", tmp_path)
        assert f"sbatch.{name}: " in message
        assert key in message or "write the option's full name" in message, message
        assert read_options({name: None}, "sbatch") == read_options({name: False}, "sbatch") == {}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{}", {"requeue": True}),
        ("{requeue: true}", {"requeue": True}),
        ("{no-requeue: false}", {"requeue": True}),
        ("{requeue: false}", {"no-requeue": True}),
        ("{no-requeue: true}", {"no-requeue": True}),
        ("{no_requeue: true}", {"no-requeue": True}),
        ("{requeue: null}", {}),
        ("{no-requeue: true, requeue: null}", {"no-requeue": True}),
    ],
)
def test_requeue_is_given_once(section, expected, tmp_path):
    assert merge_options({"requeue": True}, read(f"sbatch: {section}", tmp_path).sbatch) == expected


@pytest.mark.parametrize(
    ("section", "gpus", "option"),
    [
        ('{gres: "gpu:4"}', 4, {"gres": "gpu:4"}),
        ('{gres: "gpu"}', 1, {"gres": "gpu:1"}),
        ('{gres: "gpu:a100"}', "a100:1", {"gres": "gpu:a100:1"}),
        ('{gres: "gpu:a100:4"}', "a100:4", {"gres": "gpu:a100:4"}),
        ('{gres: "gpu:1g.5gb:2"}', "1g.5gb:2", {"gres": "gpu:1g.5gb:2"}),
        ('{gres: "gpu=4"}', 4, {"gres": "gpu:4"}),
        ('{gres: "gres/gpu:4"}', 4, {"gres": "gpu:4"}),
        ('{gres: "gres:gpu:4"}', 4, {"gres": "gpu:4"}),
        ('{--gres: "gpu:4"}', 4, {"gres": "gpu:4"}),
        ('{gres: ["gpu:4", "nvme:1"]}', 4, {"gres": "gpu:4,nvme:1"}),
        ('{gres: "nvme:1,gpu:a100:4"}', "a100:4", {"gres": "gpu:a100:4,nvme:1"}),
        ('{gres: "nvme:1"}', None, {"gres": "nvme:1"}),
        ('{gres: "gpu:0"}', None, {}),
        ("{gpus: 4}", 4, {"gpus": "4"}),
        ("{G: 4}", 4, {"gpus": "4"}),
        ('{gpus: "a100:4"}', "a100:4", {"gpus": "a100:4"}),
        ("{gpus: 0}", None, {}),
        ("{gpus: null}", None, {}),
        ("{exclusive: true}", None, {"exclusive": True}),
    ],
)
def test_gpus_requested_by_options_count_the_ranks(section, gpus, option, tmp_path):
    profile = read(f"sbatch: {section}", tmp_path)
    assert profile.launch.get("gpus_per_node") == gpus
    assert with_gpus(profile.sbatch, gpus, 1) == option


@pytest.mark.parametrize(
    ("options", "gpus", "nodes", "expected"),
    [
        ({}, 4, 2, {"gpus-per-node": "4"}),
        ({}, "a100:4", 2, {"gpus-per-node": "a100:4"}),
        ({}, None, 2, {}),
        ({}, 0, 2, {}),
        ({"gres": "gpu:8,nvme:1", "mem": "0"}, 2, 2, {"gres": "gpu:2,nvme:1", "mem": "0"}),
        ({"gres": "gpu:8"}, "h100:2", 2, {"gres": "gpu:h100:2"}),
        ({"gres": "gpu:8,nvme:1"}, None, 1, {"gres": "nvme:1"}),
        ({"gres": "nvme:1"}, 4, 1, {"gres": "nvme:1", "gpus-per-node": "4"}),
        ({"gpus": "8"}, 2, 1, {"gpus": "2"}),
        ({"gpus": "a100:8"}, "a100:4", 3, {"gpus": "a100:12"}),
        ({"gpus": "8"}, 0, 1, {}),
    ],
)
def test_another_number_of_gpus_is_requested_by_the_profiles_option(options, gpus, nodes, expected):
    assert with_gpus(options, gpus, nodes) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('sbatch: {gres: "gpu:a:1,gpu:b:2"}', "several types of GPU"),
        ('sbatch: {gpus: "a:1,b:2"}', "several types of GPU"),
        ('sbatch: {gres: "gpu:4", gpus: 4}', "both request GPUs"),
        ('gpus_per_node: 4\nsbatch: {gres: "gpu:4"}', "both request GPUs: keep one"),
        ("gpus_per_node: 4\nsbatch: {gpus: 4}", "both request GPUs: keep one"),
        ('sbatch: {gres: "gpu:"}', "expected GPUs as gpu:4 or gpu:a100:4"),
        ('sbatch: {gres: "gpu:a100:four"}', "expected GPUs as gpu:4 or gpu:a100:4"),
        ('sbatch: {gres: "gpu:a:b:4"}', "expected GPUs as gpu:4 or gpu:a100:4"),
        ("sbatch: {gpus: many}", "expected GPUs as 4 or a100:4"),
        ("sbatch: {gpus: true}", "sbatch.gpus is true; expected a number"),
        ("sbatch: {gres: true}", "sbatch.gres is true; expected a number"),
        ("sbatch: {gpu-bind: closest}", "ranks choose among all GPUs"),
        ('sbatch: {gpu_bind: "single:1"}', "ranks choose among all GPUs"),
        ('sbatch: {tres-per-task: "gres/gpu:1"}', "ranks choose among all GPUs"),
        ('sbatch: {tres-per-node: "gres/gpu:1"}', "set gpus_per_node"),
        ("srun: [--gpus-per-task=1]", "set gpus_per_node"),
        ('srun: ["--gpu-bind=single:1"]', "set gpus_per_node"),
        ("srun: [--ntasks=3]", "ranks_per_node"),
        ("srun: [-n3]", "ranks_per_node"),
        ("srun: [-N, '2']", "key nodes"),
        ("srun: [--output=x]", "run folder"),
        ("gpus_per_node: 'a b:4'", "gpus_per_node is 'a b:4'; expected"),
        ("gpus_per_node: a100", "gpus_per_node is 'a100'; expected"),
        ("gpus_per_node: -1", "gpus_per_node is -1; expected"),
        ("gpus_per_node: [4]", "gpus_per_node is [4]; expected"),
    ],
)
def test_invalid_requests_of_gpus(text, message, tmp_path):
    assert message in refused(text, tmp_path)


def test_bindings_and_arguments_that_change_nothing():
    assert read_options({"gpu-bind": "none"}, "sbatch") == {"gpu-bind": "none"}
    assert read_options({"tres-per-task": "license/a:1"}, "sbatch") == {"tres-per-task": "license/a:1"}
    check_srun(["--container-image=i.sqsh", "--label", "--mpi=pmix", "-l"], "srun")


def test_the_name_that_submitit_would_set():
    assert merge_options({}, read_options({"wckey": None}, "sbatch")) == {}
    assert read_options({"wckey": None}, "sbatch") == {"wckey": None}
    assert read_options({"wckey": "mine"}, "sbatch") == {"wckey": "mine"}


@pytest.mark.parametrize(
    ("text", "env"),
    [
        ("env: {A: b, B: 3, C: 1.10, D: true, E: false, F: no, _g1: ''}",
         {"A": "b", "B": "3", "C": "1.10", "D": "true", "E": "false", "F": "no", "_g1": ""}),
        ("env: {A: null, B: ~, C: x}", {"C": "x"}),
        ("env:", {}),
    ],
)  # fmt: skip
def test_the_environment_is_text(text, env, tmp_path):
    assert read(text, tmp_path).env == env


@pytest.mark.parametrize("name", ["E F", "1A", "A-B", "A.B", "A=B", "", "Ä", "A;rm", "A$(B)"])
def test_invalid_names_of_variables(name, tmp_path):
    assert f"env: {name!r} is not a variable name" in refused(f'env: {{"{name}": 1}}', tmp_path)


@pytest.mark.parametrize("value", ["[a]", "{a: b}", '"a\\0b"'])
def test_invalid_values_of_variables(value, tmp_path):
    assert "env.A is " in refused(f"env: {{A: {value}}}", tmp_path)


def test_sections_without_values_are_empty(tmp_path):
    profile = read("sbatch:\nenv:\nsrun:\nsetup:\nmatch:\nscratch:\npartition:\n", tmp_path)
    assert (profile.sbatch, profile.env, profile.srun, profile.setup, profile.match) == ({}, {}, [], [], [])
    assert profile.scratch is None
    assert profile.launch == {"partition": None}
