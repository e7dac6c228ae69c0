import pytest
import torch

from pp_lightning import UserError, kept_units, prune_
from pp_lightning.methods import FLAP
from pp_lightning.methods.base import StaticChoice
from pp_lightning.methods.recorded import Choices, Recorded
from pp_lightning.pruning import pruning_of
from tests.models import SETTINGS, choices, ids, logits, statistics, tiny


def recorded(name):
    """FLAP's choices, with their biases, and the model that it pruned."""
    model, stats = tiny(name), statistics(name)
    prune_(model, FLAP(), stats, **SETTINGS)
    pruning = pruning_of(model)
    kept = {key: StaticChoice(units, pruning.biases.get(key)) for key, units in pruning.choices.items()}
    return Choices(stats.model, kept, {"method": "flap"}), model


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_a_recorded_choice_gives_the_same_model(name, tmp_path):
    made, flap = recorded(name)
    made.save(tmp_path / "choices.safetensors")
    model = tiny(name)
    prune_(model, Recorded(["attention", "mlp"]), Choices.load(tmp_path / "choices.safetensors"), **SETTINGS)
    assert choices(kept_units(model)) == choices(kept_units(flap))
    assert torch.equal(logits(model, ids()), logits(flap, ids()))
    assert Choices.load(tmp_path / "choices.safetensors").about == {"method": "flap"}
    assert any(choice.bias is not None for choice in made.choices.values())


def test_another_model_and_missing_blocks():
    made, _ = recorded("llama")
    with pytest.raises(UserError, match="these choices were collected on another model"):
        prune_(tiny("llama_gqa"), Recorded(["attention", "mlp"]), made, **SETTINGS)
    del made.choices[next(key for key in made.choices if key[0] == 3)]
    with pytest.raises(UserError, match="do not cover the attention block of layer 3"):
        prune_(tiny("llama"), Recorded(["attention", "mlp"]), made, **SETTINGS)
