import pytest

from pp_lightning import Statistics, UserError
from pp_lightning.blocks import AttentionUnit, Block
from pp_lightning.importances import Importances
from pp_lightning.methods import METHODS, FullBatchProbing, LLMPruner, LoRAPrune, ProbePruning, StaticMethod


def test_labels():
    assert {label: method.__name__ for label, method in METHODS.items()} == {
        "full_batch": "FullBatchProbing",
        "pp": "ProbePruning",
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
        assert made.blocks == (Block.ATTENTION, Block.MLP)
        assert made.attention_unit is None
        assert made.settings()["blocks"] == ["attention", "mlp"]
        assert made.needs_statistics == (method is not FullBatchProbing)
        assert made.evidence is (Importances if method in (LLMPruner, LoRAPrune) else Statistics)

    def test_settings_are_plain_and_complete(self, method):
        settings = method(blocks=["mlp"], attention_unit="kv_group").settings()
        assert settings["blocks"] == ["mlp"]
        assert settings["attention_unit"] == "kv_group"
        assert type(settings["attention_unit"]) is str
        again = method(**{k: v for k, v in settings.items() if method is not FullBatchProbing or k != "probe_source"})
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
        "blocks": ["attention", "mlp"],
        "attention_unit": None,
    }


def test_static_methods_need_scores():
    class Unfinished(StaticMethod):
        label = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()
