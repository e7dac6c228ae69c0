import pytest
import torch

from pp_lightning import Importances, Statistics, UserError, prune_, taylor_importances
from pp_lightning.blocks import Block
from pp_lightning.methods import LLMPruner, WandaSP
from tests.models import SETTINGS, ids, statistics, tiny


@pytest.fixture(scope="module")
def importances():
    return taylor_importances(tiny("llama_gqa"), [{"input_ids": ids()}], progress=False)


def test_file_round_trip(importances, tmp_path):
    file = tmp_path / "deep" / "importances.safetensors"
    importances.save(file)
    again = Importances.load(file)
    assert (again.model, again.kind) == (importances.model, importances.kind)
    assert again.members.keys() == importances.members.keys()
    for key, members in importances.members.items():
        assert all(torch.equal(again.members[key][role], vector) for role, vector in members.items())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_files(importances, tmp_path):
    statistics("llama").save(tmp_path / "statistics")
    with pytest.raises(UserError, match="holds no importances of this version: collect again"):
        Importances.load(tmp_path / "statistics")
    importances.save(tmp_path / "importances")
    with pytest.raises(UserError, match="holds no statistics of this version: calibrate again"):
        Statistics.load(tmp_path / "importances")
    with pytest.raises(UserError, match="cannot read importances"):
        Importances.load(tmp_path / "nowhere")


def test_another_model(importances):
    with pytest.raises(UserError, match=r"these importances were collected on another model.*: collect it"):
        prune_(tiny("llama"), LLMPruner(), importances, **SETTINGS)


def test_another_kind_of_evidence(importances):
    with pytest.raises(UserError, match="LLMPruner needs importances: pass the result of taylor_importances"):
        prune_(tiny("llama_gqa"), LLMPruner(), statistics("llama_gqa"), **SETTINGS)
    with pytest.raises(UserError, match=r"WandaSP needs calibration statistics: pass the result of calibrate\(\)"):
        prune_(tiny("llama_gqa"), WandaSP(), importances, **SETTINGS)


def test_another_variant_and_missing_layers(importances):
    with pytest.raises(UserError, match="are param_first, but the method asks for param_mix"):
        prune_(tiny("llama_gqa"), LLMPruner(taylor="param_mix"), importances, **SETTINGS)
    del importances.members[3, Block.MLP]
    model = tiny("llama_gqa")
    with pytest.raises(UserError, match="do not cover the mlp block of layer 3"):
        prune_(model, LLMPruner(), importances, **SETTINGS)
    assert model.model.layers[2].mlp.up_proj.out_features == 160  # nothing half done
