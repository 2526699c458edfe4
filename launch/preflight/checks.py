"""What can be found wrong with a job before it waits in a queue: one line each, without torch."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from launch.executor import JobSpec, minutes
from launch.preflight import limits
from launch.preflight.estimate import count, estimate, trunk_values
from shards.errors import UserError
from toolkit.config.schema import Config, gpu_count, micro_batch
from toolkit.config.validate import batch_warnings
from toolkit.run_folder import check_run, to_yaml

# Said of a job that no node can ever run, which sbatch itself may take and let wait for ever, or that sbatch refuses.
_NO_NODES = "Requested node configuration is not available"  # said of nodes that are down for now, too
_HOPELESS = re.compile(f"{_NO_NODES}|Invalid")
_PARTITION = re.compile(r"^#SBATCH --partition=(\S+)$", re.MULTILINE)


class Check(NamedTuple):
    """Something to look at; `look` says what it found, or raises a `UserError`."""

    name: str
    look: Callable[[], str]
    of: object = None  # what the answer depends on, apart from what all members of a grid have in common


def distinct(checks: Iterable[tuple[str, Check]]) -> Iterator[tuple[str, Check]]:
    """The same checks, each with a word of whose it is, without those whose answer another's gives."""
    seen = set()
    for whose, check in checks:
        key = (check.name, repr(check.of))
        if key not in seen:
            seen.add(key)
            yield whose, check


def job_checks(asked: JobSpec) -> list[Check]:
    """What does not need the shards."""
    config = asked.config
    checks = [
        Check("GPUs", lambda: check_gpus(asked)),
        Check("time", lambda: f"{minutes(config.launch.time)} minutes"),
        Check("batch", lambda: check_batch(config, asked.ranks), (config.training, config.objectives)),
        Check("model", lambda: check_model(config), (config.model, config.objectives)),
        Check("run folder", lambda: check_folder(config, asked.ranks), config.run),
    ]
    if config.deepspeed:
        of = (config.deepspeed, config.training)
        checks.append(Check("deepspeed", lambda: check_deepspeed(config, asked.ranks), of))
    if asked.cluster == "slurm":
        launch = config.launch
        checks.append(Check("partition", lambda: check_partition(asked)))
        checks += [_known(kind, name) for kind, name in (("account", launch.account), ("qos", launch.qos)) if name]
        checks.append(Check("limits", lambda: check_limits(asked)))
    return checks


def check_batch(config: Config, ranks: int) -> str:
    """Divide the batch among the ranks, and say what an objective loses by the size of a part.

    Raises:
        UserError: It does not divide.
    """
    pairs = f"{micro_batch(config, ranks)} pairs a rank and micro-batch"
    return "; ".join([pairs, *(f"warning: {line}" for line in batch_warnings(config, ranks))])


def data_checks(asked: JobSpec) -> list[Check]:
    """What needs the shards."""
    config = asked.config
    return [
        Check("shards", lambda: check_shards(config), (config.data, config.evaluation, config.final)),
        Check("order", lambda: check_order(config, asked.ranks), (config.data, config.training, config.seed)),
    ]


def check_gpus(asked: JobSpec) -> str:
    """Compare the GPUs of a node with its ranks.

    Raises:
        UserError: There are fewer, or they are asked for as a number of the whole job, of several nodes.
    """
    launch, ranks = asked.config.launch, asked.ranks_per_node
    count = gpu_count(launch.gpus_per_node)
    if not count or asked.cluster != "slurm":
        return "none asked for"
    if "gpus" in asked.profile.sbatch and launch.nodes > 1:
        raise UserError(
            f"sbatch.gpus of the profile {asked.profile.name} counts GPUs of the whole job, which SLURM may share out "
            f"unevenly over {launch.nodes} nodes: set gpus_per_node to those of each node instead"
        )
    if count < ranks:
        raise UserError(f"{ranks} ranks a node cannot share {count} GPUs: set --ranks-per-node to {count} or less")
    idle = f", {count - ranks} of them idle: --ranks-per-node 0 gives each a rank" if count > ranks else ""
    return f"{count} for {ranks} ranks a node{idle}"


def check_model(config: Config) -> str:
    """Look at what of the trunks can be seen without building them.

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
    """Can the run be written there, and is there room for its checkpoints?

    Raises:
        UserError: The folder holds another run, cannot be written, or its disk is too full.
    """
    check_run(config)
    folder = Path(config.run).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} cannot be written: name another run folder with --run DIR")
    free = shutil.disk_usage(there).free
    counts = count(config)
    needed = 0.0
    if counts is not None:
        sizes = estimate(config, counts, ranks)
        needed = disk(config, sizes.checkpoint, sizes.export)
    if free < needed:
        raise UserError(
            f"{there} has {free / 1e9:,.1f} GB free, the run may take {needed / 1e9:,.1f} GB: name another with "
            "--run DIR, or keep fewer checkpoints with --training.keep_checkpoints"
        )
    return f"{folder} can be written, {free / 1e9:,.0f} GB free"


def disk(config: Config, checkpoint: float, export: float) -> float:
    """Bytes that a run takes at most: the checkpoints kept, the best and one on its way; two exports and one."""
    return (config.training.keep_checkpoints + 2) * checkpoint + 3 * export


def check_deepspeed(config: Config, ranks: int) -> str:
    """Have DeepSpeed itself look at the section `deepspeed`, in a process of its own: importing it takes seconds.

    Raises:
        UserError: It does not take a key or a value.
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
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["DeepSpeed refuses the section"]
        raise UserError(lines[-1].removeprefix("error: "))
    return "DeepSpeed takes the section"


def check_shards(config: Config) -> str:
    """Look for the manifests, the splits, and every shard with its size.

    Raises:
        UserError: Something is missing or has another size than the manifest says.
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
                check_size(manifest.folder / shard.name, shard.bytes)
        shards += len(manifest.shards)
        total += sum(shard.bytes for shard in manifest.shards)
    remote = " (remote ones were not looked at)" if any(manifest.url for manifest in manifests) else ""
    return f"{shards:,} shards of {total / 1e9:,.2f} GB are there, with the sizes of their manifest{remote}"


def check_size(path: Path, expected: int) -> None:
    """Compare a file's size with what the manifest says.

    Raises:
        UserError: It is another, or there is no file.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, though the manifest names it: make the shards again") from None
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, the manifest says {expected:,}: make the shards again")


def check_order(config: Config, ranks: int) -> str:
    """Lay out the order of samples.

    Raises:
        UserError: Batch, ranks, lanes and shards do not fit one another.
    """
    from toolkit.data import open_order

    _, order = open_order(config, ranks)
    return f"{order.steps_per_epoch:,.2f} steps a pass"


def check_partition(asked: JobSpec) -> str:
    """Ask SLURM whether the partition is there, up, large enough, and lets a job run that long.

    Raises:
        UserError: It is not, or there is no default one; with several named, none of them will do.
    """
    launch, known = asked.config.launch, limits.partitions()
    names = limits.chosen(asked, known)
    problems = [limits.partition_problem(known[name], asked) for name in names]
    if all(problems):
        raise UserError(f"partition {names[0]} {problems[0]}")
    return f"{names[problems.index(None)]} is up, and takes {launch.nodes} nodes for {launch.time}"


def check_limits(asked: JobSpec) -> str:
    """Ask SLURM's accounting for limits of QOS, user and account, where SLURM enforces any.

    Raises:
        UserError: The job is above one, in every partition that it may run in.
    """
    if not limits.enforced():
        return "SLURM enforces none"
    known = limits.partitions()
    problems = [limits.limits_problem(known[name], asked) for name in limits.chosen(asked, known)]
    if all(problems):
        raise UserError(str(problems[0]))
    return "those of QOS, user and account leave room for the job"


def check_known(kind: str, names: str) -> str:
    """Ask SLURM's accounting for accounts or QOS; where there is no accounting nothing is asked.

    Args:
        kind: "account" or "qos".
        names: One, or several with commas between; capitals do not matter, as for sbatch.

    Raises:
        UserError: It does not know one of them.
    """
    known = limits.names(kind)
    if not known:
        return "not looked at: no accounting"
    for name in names.split(","):
        if name.strip().lower() not in known:
            raise UserError(f"--{kind} {name}: SLURM knows none of that name; there are {', '.join(known)}")
    return f"SLURM knows {names}"


def check_script(script: str, only_hopeless: bool = False) -> str:
    """Have `sbatch --test-only` look at a script; nothing is submitted.

    Args:
        script: Its text.
        only_hopeless: Let pass what may change while a job waits, such as nodes that are down.

    Raises:
        UserError: SLURM would refuse it, or never run it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        answer = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
    said = " ".join(f"{answer.stdout} {answer.stderr}".replace("sbatch:", " ").split())
    if answer.returncode == 0:
        return said
    away = limits.nodes_away(_PARTITION.findall(script)) if _NO_NODES in said else []
    if only_hopeless and (away or not _HOPELESS.search(said)):
        return said
    now = f" now: {said}; it may once {', '.join(away)} can be used again" if away else f": {said}"
    raise UserError(f"SLURM would not run the job{now}")


def _known(kind: str, name: str) -> Check:
    return Check(kind, lambda: check_known(kind, name))
