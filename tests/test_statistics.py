import pytest
import torch
from safetensors.torch import save_file

from pp_lightning import Statistics, UserError, calibrate
from pp_lightning.blocks import Block
from pp_lightning.statistics import BlockSums, fingerprint
from tests.models import calibration_batches, statistics, tiny


def small() -> Statistics:
    result = Statistics("model", counts=torch.tensor([2.0, 1.0, 0.0]), num_batches=1, batches_digest="abc")
    squares = torch.tensor([[8.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    values = torch.tensor([[4.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    result.sums[3, Block.MLP] = BlockSums(squares, values)
    result.residuals[3, Block.MLP] = torch.tensor([10.0, 7.0, 0.0])
    return result


def test_moments():
    result = small()
    assert result.num_positions == 3
    assert result.second_moment(3, Block.MLP).tolist() == [[4.0, 1.0], [3.0, 0.0], [0.0, 0.0]]
    assert result.energy(3, Block.MLP).tolist() == [7.0, 1.0]
    mean, second = result.channel_moments(3, Block.MLP)
    torch.testing.assert_close(mean, torch.tensor([5 / 3, 2 / 3]))
    torch.testing.assert_close(second, torch.tensor([11 / 3, 2 / 3]))
    assert result.means(3, Block.MLP).tolist() == [[2.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert result.residual_energy(3, Block.MLP).tolist() == [5.0, 7.0, 0.0]


def test_is_shown_in_one_short_line():
    assert repr(small()) == "Statistics(batches=1, tokens=3, positions=3, blocks=1, means=True)"
    found = repr(calibrate(tiny("llama"), calibration_batches(2), means=False, progress=False))
    assert found == "Statistics(batches=2, tokens=256, positions=32, blocks=10, means=False)"


def test_release_gives_the_sums_up():
    result = small()
    kept = result.second_moment(3, Block.MLP)
    memory = result.sums[3, Block.MLP].squares.data_ptr()
    released = result.second_moment(3, Block.MLP, release=True)
    assert torch.equal(released, kept)
    assert released.data_ptr() == memory  # no second copy
    assert not result.sums


def test_round_trip(tmp_path):
    result = statistics("llama_gqa")
    path = tmp_path / "new" / "stats.safetensors"
    result.save(path)
    loaded = Statistics.load(path)
    assert (loaded.model, loaded.num_batches, loaded.batches_digest) == (
        result.model,
        result.num_batches,
        result.batches_digest,
    )
    assert torch.equal(loaded.counts, result.counts)
    assert loaded.sums.keys() == result.sums.keys()
    for key, sums in result.sums.items():
        assert torch.equal(loaded.sums[key].squares, sums.squares)
        assert torch.equal(loaded.sums[key].values, sums.values)
        assert torch.equal(loaded.residuals[key], result.residuals[key])
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]


def test_round_trip_without_means(tmp_path):
    model = tiny("llama")
    result = calibrate(model, calibration_batches(1), means=False, progress=False)
    result.save(tmp_path / "stats")
    loaded = Statistics.load(tmp_path / "stats")
    assert all(sums.values is None for sums in loaded.sums.values())
    with pytest.raises(UserError, match=r"have no means, which this method needs: calibrate\(..., means=True\)"):
        loaded.channel_moments(0, Block.MLP)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats"
    small().save(path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("pp_lightning.stored.write_tensors", fail)
    with pytest.raises(UserError, match=r"cannot write statistics to .*disk full"):
        small().save(path)
    assert path.read_bytes() == before


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read statistics from .*nowhere"):
        Statistics.load(tmp_path / "nowhere")


def test_corrupt_file(tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="cannot read statistics from"):
        Statistics.load(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "stats"
    statistics("llama").save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read statistics from"):
        Statistics.load(path)


def test_some_other_safetensors_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds no statistics of this version: calibrate again"):
        Statistics.load(path)


def test_block_that_is_not_covered():
    for ask in (small().energy, small().second_moment, small().channel_moments):
        with pytest.raises(UserError, match="do not cover the attention block of layer 3"):
            ask(3, Block.ATTENTION)


def test_fingerprint_tells_models_apart():
    model = tiny("llama")
    original = fingerprint(model)
    assert fingerprint(tiny("llama")) == original
    statistics("llama").check_model(model)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(model) != original
    with pytest.raises(UserError, match="collected on another model, or on this one in another dtype: calibrate it"):
        statistics("llama").check_model(model)


@pytest.mark.parametrize("other", ["llama_gqa", "opt"])
def test_fingerprint_of_other_architectures(other):
    assert fingerprint(tiny(other)) != fingerprint(tiny("llama"))


def test_fingerprint_of_another_dtype():
    with pytest.raises(UserError, match="in another dtype"):
        statistics("llama").check_model(tiny("llama").bfloat16())
