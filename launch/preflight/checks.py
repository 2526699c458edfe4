"""Checks of a job before it is submitted, without torch; each gives one line."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from launch.executor import JobSpec, minutes
from launch.preflight import limits
from launch.preflight.estimate import count, estimate, trunk_values
from launch.slurm import client
from shards.errors import UserError
from toolkit.config.schema import Config, gpu_count, micro_batch
from toolkit.config.validate import batch_warnings
from toolkit.run_folder import check_run, to_yaml

# SLURM's messages on jobs that no node can ever run (sbatch may accept them all the same), or that sbatch refuses.
_NO_NODES = "Requested node configuration is not available"  # also while nodes are down
_PERMANENT = re.compile(f"{_NO_NODES}|Invalid")
_PARTITION = re.compile(r"^#SBATCH --partition=(\S+)$", re.MULTILINE)


class Check(NamedTuple):
    """A named check; `run` returns its result in a line, or raises a `UserError`."""

    name: str
    run: Callable[[], str]
    key: object = None  # what the result depends on, apart from what all members of a grid share


def distinct(checks: Iterable[tuple[str, Check]]) -> Iterator[tuple[str, Check]]:
    """Yield the checks, each with the name of its member, without those that have the same result as an earlier one."""
    seen = set()
    for member, check in checks:
        key = (check.name, repr(check.key))
        if key not in seen:
            seen.add(key)
            yield member, check


def job_checks(spec: JobSpec) -> list[Check]:
    """Return the checks that do not need the shards."""
    config = spec.config
    checks = [
        Check("GPUs", lambda: check_gpus(spec)),
        Check("time", lambda: f"{minutes(config.launch.time)} minutes"),
        Check("batch", lambda: check_batch(config, spec.ranks), (config.training, config.objectives)),
        Check("model", lambda: check_model(config), (config.model, config.objectives)),
        Check("run folder", lambda: check_folder(config, spec.ranks), config.run),
    ]
    if config.deepspeed:
        key = (config.deepspeed, config.training)
        checks.append(Check("deepspeed", lambda: check_deepspeed(config, spec.ranks), key))
    if spec.cluster == "slurm":
        launch = config.launch
        checks.append(Check("partition", lambda: check_partition(spec)))
        names = {"account": launch.account, "qos": launch.qos}
        checks += [Check(kind, partial(check_exists, kind, name)) for kind, name in names.items() if name]
        checks.append(Check("limits", lambda: check_limits(spec)))
    return checks


def check_batch(config: Config, ranks: int) -> str:
    """Divide the batch among the ranks, and warn of objectives that a small part harms.

    Raises:
        UserError: It does not divide.
    """
    pairs = f"{micro_batch(config, ranks)} pairs a rank and micro-batch"
    return "; ".join([pairs, *(f"warning: {line}" for line in batch_warnings(config, ranks))])


def data_checks(spec: JobSpec) -> list[Check]:
    """Return the checks that need the shards."""
    config = spec.config
    return [
        Check("shards", lambda: check_shards(config), (config.data, config.evaluation, config.final)),
        Check("order", lambda: check_order(config, spec.ranks), (config.data, config.training, config.seed)),
    ]


def check_gpus(spec: JobSpec) -> str:
    """Compare the GPUs of a node with its ranks.

    Raises:
        UserError: There are fewer, or they are requested as a number for all nodes of a job of several.
    """
    launch, ranks = spec.config.launch, spec.ranks_per_node
    count = gpu_count(launch.gpus_per_node)
    if not count or spec.cluster != "slurm":
        return "none requested"
    if "gpus" in spec.profile.sbatch and launch.nodes > 1:
        raise UserError(
            f"sbatch.gpus of the profile {spec.profile.name} counts all GPUs of a job, which SLURM may divide "
            f"unevenly among {launch.nodes} nodes: set gpus_per_node instead"
        )
    if count < ranks:
        raise UserError(f"{ranks} ranks a node cannot share {count} GPUs: set --ranks-per-node to {count} or less")
    idle = f", {count - ranks} of them idle: --ranks-per-node 0 gives each a rank" if count > ranks else ""
    return f"{count} for {ranks} ranks a node{idle}"


def check_model(config: Config) -> str:
    """Check the trunks without building them.

    Raises:
        UserError: A folder is missing, more layers are to be trained than there are, or heads do not divide a width.
    """
    for name, encoder in (("speech", config.model.speech), ("image", config.model.image)):
        if encoder.trunk and encoder.trunk[0] in "/.~" and not Path(encoder.trunk).expanduser().is_dir():
            raise UserError(f"model.{name}.trunk: no folder {encoder.trunk}: give one that transformers wrote")
        trunk = trunk_values(encoder)
        if trunk is None:
            continue
        layers, width = trunk["num_hidden_layers"], trunk["hidden_size"]
        if encoder.train.isdecimal() and int(encoder.train) > layers:
            raise UserError(f"model.{name}.train: expected none, all or 1 to {layers}, got {encoder.train!r}")
        if encoder.head_layers and width % encoder.head_heads:
            raise UserError(f"model.{name}.head_heads: {encoder.head_heads} does not divide the width {width}")
    counts = count(config)
    return "size unknown before the trunks are there" if counts is None else f"{counts.total / 1e6:,.1f} M parameters"


def check_folder(config: Config, ranks: int) -> str:
    """Check that the run folder can be written and that its disk has room for the checkpoints.

    Raises:
        UserError: The folder has another run, cannot be written, or its disk is too full.
    """
    check_run(config)
    folder = Path(config.run).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written: name another run folder with --run DIR")
    free = shutil.disk_usage(existing).free
    counts = count(config)
    needed = 0.0
    if counts is not None:
        sizes = estimate(config, counts, ranks)
        needed = disk(config, sizes.checkpoint, sizes.export)
    if free < needed:
        raise UserError(
            f"{existing} has {free / 1e9:,.1f} GB free, the run may take {needed / 1e9:,.1f} GB: name another with "
            "--run DIR, or keep fewer checkpoints with --training.keep_checkpoints"
        )
    return f"{folder} can be written, {free / 1e9:,.0f} GB free"


def disk(config: Config, checkpoint: float, export: float) -> float:
    """Return the most bytes of a run: the checkpoints kept, the best and one being written; two exports and one."""
    return (config.training.keep_checkpoints + 2) * checkpoint + 3 * export


def check_deepspeed(config: Config, ranks: int) -> str:
    """Validate the section `deepspeed` by DeepSpeed, in a separate process: importing it takes seconds.

    Raises:
        UserError: DeepSpeed rejects a key or a value.
    """
    code = (
        "import sys; from shards.errors import run_main; from toolkit.config.load import load_config;"
        "from toolkit.training.zero.settings import deepspeed_config;"
        "run_main(lambda: deepspeed_config(load_config(sys.argv[1:3]), int(sys.argv[3])) and None)"
    )
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-c", code, "--config", str(file), str(ranks)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["DeepSpeed rejects the section"]
        raise UserError(lines[-1].removeprefix("error: "))
    return "accepted by DeepSpeed"


def check_shards(config: Config) -> str:
    """Check the manifests, the splits, and the size of every shard.

    Raises:
        UserError: Something is missing, or a size differs from the manifest's.
    """
    from shards.manifest import load

    data = config.data
    main = load(data.shards)
    for split in filter(None, [data.dev if config.evaluation.every else "", config.final.split]):
        main.rows(split)
    folders = dict.fromkeys([data.shards, *data.mixture])
    manifests = [main, *(load(folder) for folder in folders if folder != data.shards)]
    shards = total = 0
    for manifest in manifests:
        if manifest.url is None:
            for shard in manifest.shards:
                _check_size(manifest.folder / shard.name, shard.bytes)
        shards += len(manifest.shards)
        total += sum(shard.bytes for shard in manifest.shards)
    remote = " (remote ones were not checked)" if any(manifest.url for manifest in manifests) else ""
    return f"{shards:,} shards of {total / 1e9:,.2f} GB, with the sizes of their manifest{remote}"


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, though the manifest lists it: make the shards again") from None
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, not {expected:,} as in the manifest: make the shards again")


def check_order(config: Config, ranks: int) -> str:
    """Compute the order of samples.

    Raises:
        UserError: Batch size, ranks, shard groups and shards are incompatible.
    """
    from toolkit.data import open_order

    _, order = open_order(config, ranks)
    return f"{order.steps_per_epoch:,.2f} steps an epoch"


def check_partition(spec: JobSpec) -> str:
    """Check in SLURM that the partition exists, is up, and allows the job's nodes and time.

    Raises:
        UserError: It does not, or there is no default one; of several, none does.
    """
    launch, known = spec.config.launch, client.partitions()
    names = limits.requested_partitions(spec, known)
    problems = [limits.partition_problem(known[name], spec) for name in names]
    if all(problems):
        raise UserError(f"partition {names[0]} {problems[0]}")
    return f"{names[problems.index(None)]} is up, and allows {launch.nodes} nodes for {launch.time}"


def check_limits(spec: JobSpec) -> str:
    """Check the limits of QOS, user and account in SLURM's accounting, if SLURM enforces any.

    Raises:
        UserError: The job exceeds one, in every partition that it may run in.
    """
    if not limits.enforced():
        return "SLURM enforces none"
    known = client.partitions()
    problems = [limits.limits_problem(known[name], spec) for name in limits.requested_partitions(spec, known)]
    if all(problems):
        raise UserError(str(problems[0]))
    return "within those of QOS, user and account"


def check_exists(kind: str, names: str) -> str:
    """Check that SLURM's accounting has accounts or QOS of these names; without accounting nothing is checked.

    Args:
        kind: "account" or "qos".
        names: Names, separated by commas; case does not matter, as for sbatch.

    Raises:
        UserError: One of them does not exist.
    """
    known = limits.names(kind)
    if not known:
        return "not checked: no accounting"
    for name in names.split(","):
        if name.strip().lower() not in known:
            raise UserError(f"--{kind} {name}: SLURM has no such {kind}; there are {', '.join(known)}")
    return f"{names} in SLURM's accounting"


def check_script(script: str, only_permanent: bool = False) -> str:
    """Check a script by `sbatch --test-only`; nothing is submitted.

    Args:
        script: Text of the script.
        only_permanent: Ignore what may change while a job is pending, such as nodes that are down.

    Returns:
        Answer of sbatch.

    Raises:
        UserError: SLURM would refuse or never start the job.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        accepted, answer = client.sbatch_test_only(Path(file.name))
    if accepted:
        return answer
    nodes = limits.unavailable_nodes(_PARTITION.findall(script)) if _NO_NODES in answer else []
    if only_permanent and (nodes or not _PERMANENT.search(answer)):
        return answer
    reason = f" now: {answer}; it may once {', '.join(nodes)} can be used again" if nodes else f": {answer}"
    raise UserError(f"SLURM would not run the job{reason}")
