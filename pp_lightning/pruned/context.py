"""What the pruned blocks of one model share: the batch that runs, and what it is told by hooks of the model."""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from pp_lightning.errors import UserError
from pp_lightning.functional.moments import Places
from pp_lightning.pruned.caches import ChoiceMark, has_fixed_size, is_filled, mark_of, put_mark
from pp_lightning.pruned.inputs import BatchInputs, Earlier
from pp_lightning.pruned.lots import Lots
from pp_lightning.pruned.slices import SliceMemory
from pp_lightning.pruned.streams import SideStream

_PACKED = ("cu_seq_lens_q", "cache")  # arguments of a batch whose rows are several texts one after the other
_SHAPED = ("input_ids", "inputs_embeds", "hidden_states")  # arguments of a stack that tell the batch's rows and tokens


class ModelContext:
    """Filled in by hooks around the layers before they run, read by their pruned blocks.

    Args:
        num_positions: S_max, the positions that histories have; None where no block keeps a history.
        stack_names: of the arguments of the module that loops over the layers.
        layer_names: of a layer's arguments.
        uses_cache: whether the model fills a cache unless it is told not to.
        lots: what probes are drawn with; None where none are.

    Attributes:
        batch: the batch that runs, or ran last.
        memory: for one block's slice.
        frozen: leave histories as they are.
        chosen: whether there has been a batch, so that there is a choice.
        overlaps: whether parallel probes may have a stream of their own. Not where CUDA graphs are recorded: these
            share their memory, and must not run side by side.
        blocks: all pruned blocks of the model.
    """

    def __init__(
        self,
        num_positions: int | None,
        stack_names: tuple[str, ...],
        layer_names: tuple[str, ...],
        uses_cache: bool,
        lots: Lots | None = None,
    ) -> None:
        self.num_positions = num_positions
        self.batch: BatchInputs | None = None
        self.memory = SliceMemory()
        self.frozen = False
        self.chosen = False
        self.overlaps = True
        self.blocks: list[Any] = []
        self._stack_names = stack_names
        self._layer_names = layer_names
        self._uses_cache = uses_cache
        self._side: SideStream | None = None
        self._lots = lots
        self._name = uuid4().hex  # tells this pruning's caches from those of another one of the same model
        self._mark = ChoiceMark(self._name)
        self._given: Mapping[str, Any] = {}
        self._drawn: Tensor | None = None

    def begin_batch(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the module that loops over the layers: tell a prompt from what continues it.

        Raises:
            UserError: the cache belongs to another choice, or texts are packed into one row.
        """
        given = dict(zip(self._stack_names, args, strict=False)) | dict(kwargs)
        if any(given.get(name) is not None for name in _PACKED):
            raise UserError("pruned models take one text a row: generate_batch and packed rows need the dense model")
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() not in (2, 4):
            raise UserError("pruned models need a 2-D attention mask (rows, tokens), to tell padding from text")
        self._given = given
        if not torch.compiler.is_compiling():
            for block in self.blocks:
                block.begin_batch()
        inputs = next((given[name] for name in _SHAPED if given.get(name) is not None), None)
        if cache is None or not is_filled(cache):
            self.batch = None  # until the first layer is reached
            self._drawn = None if inputs is None else self._draw(inputs.shape[:2], inputs.device)
            if has_fixed_size(cache):  # made to be continued
                for block in self.blocks:
                    block.expect_decoding()
            return
        mark = mark_of(cache)
        if mark is None or mark.pruning != self._name or not mark.stands:
            raise UserError("this key/value cache belongs to another choice of heads: run its prompt again")
        self.batch = BatchInputs(torch.Size(), decoding=True)

    def enter_layers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the first layer: find the shape of a new batch, its real tokens and their positions.

        Raises:
            UserError: a position was never calibrated, or the mask is unreadable.
        """
        if self.batch is not None:
            return
        given = dict(zip(self._layer_names, args, strict=False)) | dict(kwargs)
        hidden = given[self._layer_names[0]]
        shape, told = hidden.shape[:2], self._given
        positions = told.get("position_ids")
        # Without padding no mask is made for the layers, which needed a look at the data: no second one here.
        mask = None if given.get("attention_mask") is None and positions is None else told.get("attention_mask")
        places = self._places(shape, _real_tokens(mask, shape), positions)
        use_cache = told.get("use_cache")
        caching = told.get("past_key_values") is not None or bool(self._uses_cache if use_cache is None else use_cache)
        lots = self._draw(shape, hidden.device) if self._drawn is None else self._drawn
        self._mark.stands = False
        self._mark = ChoiceMark(self._name)
        self.batch = BatchInputs(shape, places, lots, caching=caching, remember=not self.frozen)
        self.chosen = True

    def end_batch(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Forward hook of the module that loops over the layers: note on its cache which choice it was filled under."""
        self._given, given = {}, self._given
        if self.batch is None or self.batch.decoding:
            return
        cache = given.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is None:
            return
        put_mark(cache, self._mark)
        if has_fixed_size(cache):
            for block in self.blocks:
                block.hold_slices()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a layer under parallel probing: its residual is what the MLP's probe is taken from."""
        if self.batch is not None and not self.batch.decoding:
            given = dict(zip(self._layer_names, args, strict=False)) | dict(kwargs)
            self.batch.entered = self._earlier(given[self._layer_names[0]])

    def between_blocks(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of what meets the residual in front of an MLP: the next layer's attention probes it."""
        if self.batch is not None and not self.batch.decoding:
            self.batch.middle = self._earlier(self.batch.as_batch(args[0]))

    def side_stream(self, device: torch.device) -> SideStream | None:
        """The stream of parallel probes; None where there is nothing to gain from one."""
        if device.type == "cpu" or not self.overlaps or torch.compiler.is_compiling():
            return None
        if self._side is None or self._side.device != device:
            self._side = SideStream(device)
        return self._side

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which begin between two batches: an event of a stream cannot be copied."""
        return {**self.__dict__, "batch": None, "_given": {}, "_drawn": None}

    def _draw(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        return None if self._lots is None else self._lots.of_batch(shape[0], shape[1], device)

    def _earlier(self, residual: Tensor) -> Earlier:
        side = self.side_stream(residual.device)
        return Earlier(residual, None if side is None else side.moment())

    def _places(self, shape: torch.Size, real: Tensor | None, position_ids: Tensor | None) -> Places | None:
        tokens = shape[1]
        if position_ids is not None:
            if real is None:
                real = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
            positions = position_ids.expand(shape)
            needed = int(torch.where(real, positions, 0).max()) + 1
            return Places(positions, real, self._room_for(needed, tokens))
        if real is not None:
            positions, needed = real.long().cumsum(1) - 1, tokens
            if self.num_positions is not None and tokens > self.num_positions:
                needed = int(positions.max()) + 1  # padding may account for the excess; worth a look only here
            return Places(positions, real, self._room_for(needed, tokens))
        self._checked(tokens)
        return None

    def _room_for(self, needed: int, tokens: int) -> int:
        """P: the same for all batches of S tokens, whatever their padding, so that one graph serves them."""
        room = max(self._checked(needed), tokens)
        return room if self.num_positions is None else min(room, self.num_positions)

    def _checked(self, needed: int) -> int:
        if self.num_positions is not None and needed > self.num_positions:
            raise UserError(
                f"position {needed - 1} is beyond the {self.num_positions} calibrated positions: "
                "calibrate on longer windows or shorten the input"
            )
        return needed


def _real_tokens(mask: Any, shape: torch.Size) -> Tensor | None:
    """The real tokens (B, S), bool, from the mask that a model was called with; None where it has none.

    Generating with a static cache makes 4-D masks, one or one for each kind of layer, that say which query may attend
    which key: a real token may attend itself, a pad may not.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None or mask.dim() == 2:
        return None if mask is None else mask.bool()
    allowed = mask if mask.dtype == torch.bool else mask >= 0  # additive: 0 may be attended, the lowest number not
    return allowed[:, 0, :, : shape[1]].diagonal(dim1=1, dim2=2).expand(shape)
