import pytest

from pp_lightning import Statistics, UserError
from pp_lightning.blocks import AttentionUnit, Block
from pp_lightning.importances import Importances
from pp_lightning.methods import METHODS, FullBatchProbing, Griffin, LLMPruner, LoRAPrune, ProbePruning, StaticMethod


def test_labels():
    assert {label: method.__name__ for label, method in METHODS.items()} == {
        "full_batch": "FullBatchProbing",
        "pp": "ProbePruning",
        "after_ocp": "AfterOCP",
        "griffin": "Griffin",
        "static_best": "StaticBest",
        "ppsp": "StaticPPsp",
        "flap": "FLAP",
        "wanda_sp": "WandaSP",
        "llm_pruner": "LLMPruner",
        "lora_prune": "LoRAPrune",
    }
    assert all(method.label == label for label, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS.values())
class TestEveryMethod:
    def test_defaults(self, method):
        made = method()
        pruned = ["mlp"] if method is Griffin else ["attention", "mlp"]
        assert [block.value for block in made.blocks] == pruned
        assert made.attention_unit is None
        assert made.settings()["blocks"] == pruned
        assert made.needs_statistics == (method not in (FullBatchProbing, Griffin))
        assert made.calibration_data is (Importances if method in (LLMPruner, LoRAPrune) else Statistics)

    def test_settings_are_plain_and_complete(self, method):
        settings = method(blocks=["mlp"], attention_unit="kv_group").settings()
        assert settings["blocks"] == ["mlp"]
        assert settings["attention_unit"] == "kv_group"
        assert type(settings["attention_unit"]) is str
        fixed = () if method is ProbePruning else ("probe_source",)
        again = method(**{name: value for name, value in settings.items() if name not in fixed})
        assert again.settings() == settings

    def test_blocks_in_one_order(self, method):
        assert method(blocks=("mlp", "attention")).blocks == (Block.ATTENTION, Block.MLP)
        assert method(attention_unit="query_head").attention_unit is AttentionUnit.QUERY_HEAD

    @pytest.mark.parametrize("blocks", [(), ("mpl",), "mlp", ("attention", "head")])
    def test_unknown_blocks(self, method, blocks):
        with pytest.raises(UserError, match="blocks must name attention, mlp or both, not"):
            method(blocks=blocks)

    def test_unknown_unit(self, method):
        with pytest.raises(UserError, match="attention_unit must be query_head or kv_group, not 'head'"):
            method(attention_unit="head")


def test_default_settings_are_the_published_ones():
    assert ProbePruning().settings() == {
        "token_ratio": 0.5,
        "row_ratio": 0.05,
        "momentum": 0.99,
        "fusion_weight": None,
        "probe_source": "current",
        "rank_by": "residual",
        "score": "ppsp",
        "compensation": None,
        "scattered_mlp": False,
        "allocation": "uniform",
        "seed": 0,
        "prefill": "probe",
        "blocks": ["attention", "mlp"],
        "attention_unit": None,
    }


def test_static_methods_need_scores():
    class Unfinished(StaticMethod):
        label = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()
