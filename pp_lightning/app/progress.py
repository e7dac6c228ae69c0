"""The progress bar: says which row is being evaluated, and shows the steps of long batches."""

from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TaskID

from pp_lightning.app.module import PrunedLM


class EvaluationProgress(RichProgressBar):
    """Lightning's Rich progress bar, labelled with the method and ratio under evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[str, TaskID] = {}

    @property
    def test_description(self) -> str:
        """Label of the bar while testing."""
        module = self.trainer.lightning_module
        if not isinstance(module, PrunedLM):
            return "Testing"
        ratio = f" {module.pruning_ratio:.0%}" if module.method else ""
        return f"{module.label}{ratio}"

    def show(self, name: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of something called ``name``, in a bar of its own below."""
        if self.progress is None:
            return
        if done == 0 or name not in self._steps:
            self._steps[name] = self.progress.add_task(f"  {name}", total=total)
        self.progress.update(self._steps[name], completed=done)
        self.progress.refresh()
