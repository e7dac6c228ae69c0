"""What Lightning's ``ModelParallelStrategy`` does with our models: tensor parallelism, or sharded weights."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from pp_lightning.app.prunable import PrunableModule
from pp_lightning.checkpoints import Dtype, load_spread
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.methods import LoRAPrune, StaticMethod
from pp_lightning.methods.gradient import gradient_method
from pp_lightning.sharding import shard_


def spreads(strategy: Any) -> bool:
    """Whether a strategy leaves each process a part of the model."""
    return isinstance(strategy, ModelParallelStrategy)


def check_alone(strategy: Any) -> None:
    """Refuse a strategy that spreads the model."""
    if spreads(strategy):
        raise UserError("this command needs the whole model in a process: ModelParallelStrategy is for test and fit")


def spread(module: PrunableModule, data: EvaluationData, path: str | None, dtype: Dtype) -> None:
    """Spread a module's model over processes, where the trainer's strategy says so.

    For tensor parallelism the checkpoint at ``path`` is loaded again: each process reads its own part.
    """
    strategy, trainer = module.trainer.strategy, module.trainer
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh
    sharding, splitting = mesh["data_parallel"], mesh["tensor_parallel"]
    trained = trainer.state.fn is TrainerFn.FITTING
    _check(module, data, sharding.size(), splitting.size(), trained)
    if splitting.size() > 1:
        module.model = load_spread(path, dtype, splitting.size())
        return
    if isinstance(module.method, StaticMethod) and not trained:
        module.prune(data)
    shard_(module.model, sharding, trained=trained)


def _check(module: PrunableModule, data: EvaluationData, sharding: int, splitting: int, trained: bool) -> None:
    if sharding > 1 and splitting > 1:
        raise UserError("a model is either sharded or split: set data_parallel_size or tensor_parallel_size to 1")
    if not isinstance(data, LanguageModelling):
        raise UserError("tasks run in processes that have the whole model: use --trainer.strategy ddp")
    if module.recovered is not None:
        raise UserError("recovered models are evaluated whole: use --trainer.strategy ddp")
    if trained and isinstance(module.method, LoRAPrune):
        raise UserError("lora_prune closes masks over whole blocks: train it with --trainer.strategy ddp")
    if splitting > 1:
        if trained:
            raise UserError("training works on sharded weights: set --trainer.strategy.tensor_parallel_size 1")
        if module.settings.statistics is not None:
            raise UserError("each process has statistics of its own units: leave out --model.statistics")
        if module.method is not None and (module.settings.update or module.method.updates):
            raise UserError(f"{module.method.label} updates whole blocks: set tensor_parallel_size 1")
        if (gradient := gradient_method(module.method)) is not None:
            raise UserError(f"{gradient.label} needs gradients of whole blocks: set tensor_parallel_size 1")
