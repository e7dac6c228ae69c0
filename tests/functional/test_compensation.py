import torch

from pp_lightning.functional.compensation import channel_mean, restored_mean, update_mean_


def test_mean_is_over_real_tokens_only():
    states = torch.randn(3, 4, 5).half()
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    states[2] = float("nan")
    expected = torch.stack([states[0, 0], states[0, 1], states[1, 3]]).float().mean(0)
    torch.testing.assert_close(channel_mean(states, real), expected, rtol=1e-5, atol=1e-6)
    assert channel_mean(states, real).dtype == torch.float32


def test_mean_without_padding_equals_mean_with_everything_real():
    states = torch.randn(3, 4, 5)
    everything = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(channel_mean(states, None), channel_mean(states, everything))


def test_mean_of_no_token_is_zero():
    assert channel_mean(torch.full((1, 2, 3), float("inf")), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_restores_exactly_what_constant_channels_contribute():
    weight, state = torch.randn(7, 6), torch.randn(6)
    kept = torch.tensor([1, 4])
    whole = weight @ state
    part = weight[:, kept] @ state[kept]
    torch.testing.assert_close(part + restored_mean(weight, state, kept), whole)
    assert not torch.allclose(part, whole)


def test_running_mean_moves_in_kept_channels_only():
    mean, batch = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0])
    update_mean_(mean, batch * float("nan"), torch.tensor([0, 2]), momentum=0.75, finite=torch.tensor(False))
    assert mean.tolist() == [1.0, 2.0, 3.0]
    update_mean_(mean, batch, torch.tensor([0, 2]), momentum=0.75, finite=torch.tensor(True))
    assert mean.tolist() == [2.0, 2.0, 4.0]
