"""How calibration data of each kind of gradient method is collected from a data module: the seam between the two."""

from collections.abc import Sequence
from functools import singledispatch

from transformers import PreTrainedModel

from pp_lightning.data.base import EvaluationData
from pp_lightning.gradients import taylor_importances
from pp_lightning.importances import Importances
from pp_lightning.methods import LLMPruner, LoRAPrune, PruningMethod
from pp_lightning.recovery import lora_importances

_ROWS_AT_ONCE = 2  # published micro-batch of LoRAPrune


@singledispatch
def importances_for(
    method: PruningMethod, model: PreTrainedModel, data: EvaluationData, layers: Sequence[int], progress: bool
) -> Importances:
    """What a method that chooses by gradients needs, from the data's calibration text."""
    raise NotImplementedError(f"no importances for {type(method).__name__}")


@importances_for.register
def _(
    method: LLMPruner, model: PreTrainedModel, data: EvaluationData, layers: Sequence[int], progress: bool
) -> Importances:
    batches = data.calibration_batches(method.samples, method.window, batch_size=method.samples)
    return taylor_importances(model, batches, method.taylor, layers=layers, progress=progress)


@importances_for.register
def _(
    method: LoRAPrune, model: PreTrainedModel, data: EvaluationData, layers: Sequence[int], progress: bool
) -> Importances:
    batches = data.calibration_batches(method.samples, method.window, batch_size=_ROWS_AT_ONCE)
    return lora_importances(model, batches, rank=method.rank, layers=layers, seed=data.seed, progress=progress)
