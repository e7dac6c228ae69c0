"""Our writer of safetensors against their own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pp_lightning.tensor_files import DTYPES, SIZES, Placeholder, write_tensors


@pytest.mark.parametrize("metadata", [{}, {"about": 'a "name" of ünits'}])
def test_bytes_are_those_of_the_package(tmp_path, metadata):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2).bfloat16(),
        "half": torch.randn(7).half(),
        "indices": torch.arange(3),
        "number": torch.zeros(()),
        "nothing": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "theirs", metadata=metadata or None)
    places = {name: Placeholder(tensor.to("meta"), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    write_tensors(places, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_made_at_a_time(tmp_path):
    alive, most = 0, []

    class Counted:
        def __init__(self):
            nonlocal alive
            alive += 1
            most.append(alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def make():
        tensor = torch.ones(8)
        tensor.counted = Counted()
        return tensor

    write_tensors({str(n): Placeholder(torch.empty(8), make) for n in range(9)}, tmp_path / "file", {})
    assert len(most) == 9 and max(most) <= 2  # the next is made before the name of the last is given anew
    assert torch.equal(load_file(tmp_path / "file")["4"], torch.ones(8))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_has_its_size(tmp_path, name):
    tensor = torch.ones(3).to(DTYPES[name])
    assert tensor.element_size() == SIZES[name]
    write_tensors({"one": Placeholder(tensor, lambda: tensor)}, tmp_path / "file", {})
    found = load_file(tmp_path / "file")["one"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
