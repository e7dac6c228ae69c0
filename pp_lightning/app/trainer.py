"""The Trainer with one more verb: compare."""

from dataclasses import dataclass

import lightning as L

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.methods import METHODS, PruningMethod, method_named

ALL_METHODS = list(METHODS)


@dataclass(frozen=True)
class Row:
    """One row of a comparison still to be evaluated."""

    method: PruningMethod | None
    pruning_ratio: float


class PruningTrainer(L.Trainer):
    """A Lightning Trainer that can also evaluate several methods and ratios in one run."""

    def compare(
        self,
        model: PrunedLM,
        datamodule: L.LightningDataModule,
        methods: list[str] = ALL_METHODS,
        ratios: list[float] = [0.2, 0.4],  # noqa: B006 (the command line's help shows it; never changed)
        variants: dict[str, PruningMethod] | None = None,
    ) -> list[Comparison]:
        """Evaluate the dense model and several methods and ratios on the same batches: one table, one plot.

        Args:
            model: the module; its own ``method`` and ``pruning_ratio`` are not used.
            datamodule: the data; calibration is run once.
            methods: any of full_batch, pp, ppsp, flap, wanda_sp.
            ratios: fractions removed.
            variants: further rows by name: a method with settings of your own.

        Raises:
            UserError: an unknown method, or a ratio that leaves nothing.
        """
        named = {name: method_named(name) for name in methods} | (variants or {})
        rows = [Row(None, 0.0)] + [Row(method, ratio) for ratio in ratios for method in named.values()]
        for row in rows:
            model.check_plan(row.method, row.pruning_ratio)
        labels = ["dense"] + [name for _ in ratios for name in named]
        model.reuse = True
        done: list[Comparison] = []
        for label, row in zip(labels, rows, strict=True):
            evaluation = self._evaluate(model, datamodule, row, label)
            done.append(Comparison.of(evaluation, done[0].evaluation if done else evaluation))
        return done

    def _evaluate(self, model: PrunedLM, datamodule: L.LightningDataModule, row: Row, label: str) -> Evaluation:
        model.method, model.pruning_ratio, model.label = row.method, row.pruning_ratio, label
        self.test(model, datamodule=datamodule, verbose=False)
        assert model.evaluation is not None
        return model.evaluation
