"""What the pruned layers of one model share during a forward pass."""

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor, nn

from pp_lightning.errors import UserError
from pp_lightning.functional.moments import Places
from pp_lightning.pruned.caches import ChoiceMark, is_filled, mark_of, put_mark
from pp_lightning.pruned.lots import Lots
from pp_lightning.pruned.streams import SideStream
from pp_lightning.pruned.workspace import SliceWorkspace


class Earlier(NamedTuple):
    """A residual (B, S, D) that a parallel probe can be taken from.

    Attributes:
        residual: the residual.
        since: when it was there, where that is known: on an accelerator, outside of graphs.
    """

    residual: Tensor
    since: torch.Event | None


class BatchContext:
    """Filled in before each forward pass of the decoder, read by its pruned layers.

    Attributes:
        num_positions: S_max, the positions that histories have; None where no block keeps a history.
        workspace: memory for one block's slice.
        frozen: leave histories as they are.
        decoding: the batch continues a filled cache, so the choice is held.
        chosen: whether there has been a batch, so that there is a choice.
        earlier: the residual of a previous point, for parallel probing; None where there is none yet.
        overlaps: whether parallel probes may have a stream of their own. Not where CUDA graphs are recorded: these
            share their memory, and must not run side by side.

    Args:
        num_positions: see above.
        lots: what probes are drawn with; None where none are.
    """

    def __init__(self, num_positions: int | None, lots: Lots | None = None) -> None:
        self.num_positions = num_positions
        self.workspace = SliceWorkspace()
        self.frozen = False
        self.decoding = False
        self.chosen = False
        self.earlier: Earlier | None = None
        self.overlaps = True
        self._side: SideStream | None = None
        self._lots = lots
        self._drawn: Tensor | None = None
        self._name = uuid4().hex  # tells this pruning's caches from those of another one of the same model
        self._mark = ChoiceMark(self._name)
        self._places: Places | None = None
        self._explicit_positions = False
        self._shape = torch.Size()

    def begin_batch(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the decoder: tell prefill from decoding, and find real tokens and their positions.

        Raises:
            UserError: the cache belongs to another choice, a position was never calibrated, or the mask is unreadable.
        """
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | dict(kwargs)
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        assert inputs is not None, "a decoder is called with input_ids or inputs_embeds"
        self._shape = inputs.shape[:2]
        cache = given.get("past_key_values")
        self.earlier = None
        self.decoding = cache is not None and is_filled(cache)
        if self.decoding:
            mark = mark_of(cache)
            if mark is None or mark.pruning != self._name or not mark.stands:
                raise UserError("this key/value cache belongs to another choice of heads: run its prompt again")
            return
        real = _real_tokens(given.get("attention_mask"), self._shape)
        self._locate(self._shape, real, given.get("position_ids"))
        self._mark.stands = False
        self._mark = ChoiceMark(self._name)
        rows, tokens = self._shape
        self._drawn = None if self._lots is None else self._lots.of_batch(rows, tokens, inputs.device)
        self.chosen = True

    def places(self, mask: Tensor | None, device: torch.device) -> Places | None:
        """Positions of the current batch; None where columns are positions and nothing is padding.

        Args:
            device: where the layer is that asks.
            mask: the attention mask that the decoder made for its layers. It makes none when nothing is padding,
                which it has found out already: no second look at the data is needed.
        """
        if self._places is None or (mask is None and not self._explicit_positions):
            return None
        self._places = self._places.to(device)
        return self._places

    def lots_of(self, layer: int, device: torch.device) -> Tensor | None:
        """The lots (2, M) of a layer's attention and MLP probe in the current batch, where that layer is."""
        return None if self._drawn is None else self._drawn[layer].to(device)

    def mark(self, cache: Any) -> None:
        """Note on a cache that is being filled under which choice that happens."""
        put_mark(cache, self._mark)

    def publish(self, residual: Tensor) -> None:
        """Offer a residual, (B, S, D) or (B * S, D), to the parallel probe of the next pruned layer."""
        side = None if torch.compiler.is_compiling() else self.side_stream(residual.device)
        self.earlier = Earlier(residual.view(*self._shape, -1), None if side is None else side.moment())

    def earlier_on(self, device: torch.device) -> Earlier | None:
        """What was published last, where the layer is that asks: a residual of another device has waited for itself."""
        if self.earlier is None or self.earlier.residual.device == device:
            return self.earlier
        return Earlier(self.earlier.residual.to(device), None)

    def side_stream(self, device: torch.device) -> SideStream | None:
        """The stream of parallel probes; None where there is nothing to gain from one."""
        if device.type == "cpu" or not self.overlaps:
            return None
        if self._side is None or self._side.device != device:
            self._side = SideStream(device)
        return self._side

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which begin between two batches: an event of a stream cannot be copied."""
        return {**self.__dict__, "earlier": None}

    def _locate(self, shape: torch.Size, real: Tensor | None, position_ids: Tensor | None) -> None:
        self._explicit_positions = position_ids is not None
        self._places = None
        tokens = shape[1]
        if position_ids is not None:
            if real is None:
                real = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
            positions = position_ids.expand(shape)
            needed = int(torch.where(real, positions, 0).max()) + 1
            self._places = Places(positions, real, self._room_for(needed, tokens))
        elif real is not None:
            positions, needed = real.long().cumsum(1) - 1, tokens
            if self.num_positions is not None and tokens > self.num_positions:
                needed = int(positions.max()) + 1  # padding may account for the excess; worth a look only here
            self._places = Places(positions, real, self._room_for(needed, tokens))
        else:
            self._checked(tokens)

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
    """The real tokens (B, S), bool, from the mask that a decoder was called with; None where it has none.

    Generating with a static cache makes 4-D masks, one or one for each kind of layer, that say which query may attend
    which key: a real token may attend itself, a pad may not.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None or mask.dim() == 2:
        return None if mask is None else mask.bool()
    if mask.dim() != 4:
        raise UserError("pruned models need a 2-D attention mask (rows, tokens), to tell padding from text")
    allowed = mask if mask.dtype == torch.bool else mask >= 0  # additive: 0 may be attended, the lowest number not
    return allowed[:, 0, :, : shape[1]].diagonal(dim1=1, dim2=2).expand(shape)
