"""Files of a checkpoint and of an export: safetensors, read into any partition, and complete or absent."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shards.errors import UserError
from shards.files import file_sha256
from toolkit.config import schema as config


class Model:
    """A model with the interface that an export uses."""

    weight = torch.zeros(3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(state_dict, folder / "model.safetensors")


def test_an_export_holds_what_was_there_and_its_failure_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from toolkit.training.checkpointing.export import Exports
    from toolkit.training.checkpointing.progress import Progress

    exporting, model = Exports(tmp_path, config.Config(), {}), Model()
    (tmp_path / "export").touch()
    exporting.save(model, "last", Progress(step=1))
    exporting.wait()
    where = tmp_path / "export" / "last"
    assert caplog.messages[-1] == f"the model was not written to {where}: Not a directory; training goes on"
    (tmp_path / "export").unlink()
    for step in (2, 3):
        exporting.save(model, "last", progress := Progress(step=step))
        model.weight += 1  # training goes on
        progress.step = 9
    exporting.wait()
    assert load_file(where / "model.safetensors")["weight"].tolist() == [1.0] * 3
    assert json.loads((where / "progress.json").read_text())["step"] == 3
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["last"]

    def lost() -> None:
        raise UserError("taken over")

    exporting = Exports(tmp_path, config.Config(), {}, lost)
    exporting.save(model, "last", Progress(step=4))
    exporting.wait()
    assert caplog.messages[-1].endswith("UserError: taken over; training goes on")
    assert json.loads((where / "progress.json").read_text())["step"] == 3
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["last"]


def test_a_file_is_safetensors_with_its_checksum(tmp_path: Path) -> None:
    from toolkit.training.checkpointing.files import problem_of, write_tensors

    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "matrix": torch.randn(4, 5),
        "ids": torch.tensor([-1, 2**62]),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }
    info = write_tensors(tmp_path / "x.safetensors", tensors, {"a": "b"})
    assert (info.bytes, info.sha256) == ((tmp_path / info.name).stat().st_size, file_sha256(tmp_path / info.name))
    assert problem_of(tmp_path, info) is None
    actual = load_file(tmp_path / info.name)
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def fragments_of(size: int, bounds: set[int], tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    from toolkit.training.zero.state import OptimizerFragment

    edges = [0, *sorted(each for each in bounds if 0 < each < size), size]
    return [
        OptimizerFragment("a:b.c", start, stop, (size,), *(tensor[start:stop].clone() for tensor in tensors))
        for start, stop in itertools.pairwise(edges)
    ]


@examples(deadline=None)  # the first one imports DeepSpeed
@given(
    st.integers(1, 30),
    st.sets(st.integers(1, 29), max_size=5),
    st.sets(st.integers(1, 29), max_size=5),
    st.sets(st.integers(0, 5), max_size=1),
)
def test_fragments_of_any_partition_are_read_into_any_other(
    tmp_path_factory: pytest.TempPathFactory, size: int, there: set[int], here: set[int], lost: set[int]
) -> None:
    from toolkit.training.checkpointing.files import CheckpointReader, named_tensors, write_tensors

    folder = tmp_path_factory.mktemp("fragments")
    tensors = tuple(torch.randn(size) for _ in range(3))
    saved = [each for number, each in enumerate(fragments_of(size, there, tensors)) if number not in lost]
    for number, each in enumerate(saved):
        write_tensors(folder / f"{number}.safetensors", named_tensors(each), {each.name: json.dumps(each.shape)})
    reader = CheckpointReader(sorted(folder.iterdir(), reverse=True))
    wanted = fragments_of(size, here, tuple(torch.full((size,), torch.nan) for _ in range(3)))
    for each in wanted:
        if not all(any(one.start <= n < one.stop for one in saved) for n in range(each.start, each.stop)):
            with pytest.raises(UserError, match="does not hold elements"):
                reader.check(each)
            continue
        reader.check(each)
        reader.read_into(each)
        for tensor, actual in zip(tensors, (each.master, each.exp_avg, each.exp_avg_sq), strict=True):
            assert torch.equal(actual, tensor[each.start : each.stop])


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    from toolkit.training.checkpointing.files import CheckpointReader, named_tensors, write_tensors

    (saved,) = fragments_of(6, set(), tuple(torch.zeros(6) for _ in range(3)))
    write_tensors(tmp_path / "x", named_tensors(saved), {saved.name: "[2, 3]"})
    with pytest.raises(UserError, match=r"a:b\.c has shape \(2, 3\) in the checkpoint, \(6,\) in this model"):
        CheckpointReader([tmp_path / "x"]).check(saved)
