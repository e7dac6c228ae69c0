"""The progress bar: says which row is being evaluated."""

from lightning.pytorch.callbacks import RichProgressBar

from pp_lightning.app.module import PrunedLM


class EvaluationProgress(RichProgressBar):
    """Lightning's Rich progress bar, labelled with the method and ratio under evaluation."""

    @property
    def test_description(self) -> str:
        """Label of the bar while testing."""
        module = self.trainer.lightning_module
        if not isinstance(module, PrunedLM):
            return "Testing"
        ratio = f" {module.pruning_ratio:.0%}" if module.method else ""
        return f"{module.label}{ratio}"
