"""What the pruned blocks of one model share: the batch that runs, and what it is told by hooks of the model."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pp_lightning.caches import CACHE, cache_in
from pp_lightning.calibration_data import fingerprint
from pp_lightning.errors import UserError
from pp_lightning.functional.moments import TokenPositions, all_finite
from pp_lightning.functional.tracing import is_traced
from pp_lightning.interfaces import keep_addresses
from pp_lightning.pruned.cached_heads import check_can_narrow
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.conversations import (
    Conversation,
    HeldSlices,
    begin_with,
    conversation_of,
    has_fixed_size,
    is_filled,
)
from pp_lightning.pruned.inputs import BatchInputs, Earlier
from pp_lightning.pruned.locks import Lock
from pp_lightning.pruned.projection import Product
from pp_lightning.pruned.random_samples import RandomSamples
from pp_lightning.pruned.refreshing import RecentInputs
from pp_lightning.pruned.skipped import SkippedBatches
from pp_lightning.pruned.slices import SliceMemory
from pp_lightning.pruned.streams import SideStream

_SHAPED = ("input_ids", "inputs_embeds", "hidden_states")  # arguments of a stack that tell the batch's rows and tokens
_PACKED = "cu_seq_lens_q"  # argument of a batch whose rows are several texts one after the other


class ModelContext:
    """Filled in by hooks around the layers before they run, read by their pruned blocks.

    What belongs to one forward pass is the thread's that runs it. A batch chooses by the state of its beginning; states
    move when it has ended, by all of the batch or, if it fails, by nothing.

    Args:
        num_positions: S_max, the positions that histories have; None where no block keeps a history.
        stack_names: of the arguments of the module that loops over the layers.
        layer_names: of a layer's arguments.
        uses_cache: whether the model fills a cache unless it is told not to.
        held: conversations whose slices are held.
        dense_below: tokens of a prompt below which it runs dense.
        refresh: decoded tokens after which channels are chosen again; None holds the prompt's choice.
        dense_rows: rows up to which a prompt runs dense, whatever its length.
        samples: what probes are drawn with; None where none are.

    Attributes:
        memory: for one block's slice.
        held: see above.
        frozen: leave states as they are.
        part: the only layer that runs; None where all do.
        last: what the last batch was run on, by block; None before the first.
        num_batches: batches that have moved the states.
        skipped: counts batches that were not finite.
        decodes: whether prompts leave their slices for decoding, as some cache was continued.
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
        held: HeldSlices,
        dense_below: float = 0.0,
        refresh: int | None = None,
        dense_rows: int = 0,
        samples: RandomSamples | None = None,
    ) -> None:
        self.num_positions = num_positions
        self.memory = SliceMemory()
        self.held = held
        self.dense_below = dense_below
        self.refresh = refresh
        self.dense_rows = dense_rows
        self.frozen = False
        self.part: int | None = None
        self.last: list[Choice] | None = None
        self.num_batches = 0
        self.skipped = SkippedBatches()
        self.decodes = False
        self.overlaps = True
        self.blocks: list[Any] = []
        self._stack_names = stack_names
        self._layer_names = layer_names
        self._uses_cache = uses_cache
        self._side: SideStream | None = None
        self._samples = samples
        self._name = uuid4().hex  # tells this pruning's caches from those of another one of the same model
        self._maker = uuid4().hex  # and those of this model from its copies'
        self._kin: set[str] = set()  # copies with the same weights
        self._weights: str | None = None
        self._here = threading.local()
        self._running: WeakSet[BatchInputs] = WeakSet()  # what a thread leaves that dies is not counted for ever
        self._lock = Lock()

    @property
    def batch(self) -> BatchInputs | None:
        """The batch that this thread runs."""
        found: BatchInputs | None = getattr(self._here, "batch", None)
        return found

    @batch.setter
    def batch(self, batch: BatchInputs | None) -> None:
        self._here.batch = batch

    @property
    def leaving(self) -> Product | None:
        """What the output projection of a bare block does that this thread is in."""
        found: Product | None = getattr(self._here, "leaving", None)
        return found

    @leaving.setter
    def leaving(self, product: Product | None) -> None:
        self._here.leaving = product

    @contextmanager
    def only(self, layer: int) -> Iterator[None]:
        """Within this context batches run one layer, and move the states of its blocks alone."""
        self.part = layer
        try:
            yield
        finally:
            self.part = None

    def runs_dense(self, rows: int, tokens: int) -> bool:
        """Whether a prompt of (B, S) runs on all units."""
        return rows <= self.dense_rows or rows * tokens < self.dense_below

    def begin_batch(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the module that loops over the layers: tell a prompt from what continues it.

        Raises:
            UserError: the cache belongs to no prompt of this model, or texts are packed into one row.
        """
        given = dict(zip(self._stack_names, args, strict=False)) | dict(kwargs)
        if given.get(_PACKED) is not None:
            raise UserError("pruned models take one text a row: generate_batch and packed rows need the dense model")
        cache, mask = cache_in(given), given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() not in (2, 4):
            raise UserError("pruned models need a 2-D attention mask (rows, tokens), to tell padding from text")
        self._leave_batch()
        self._here.given = given
        if not is_traced():
            for block in self.blocks:
                block.follow()
        hidden = next((given[name] for name in _SHAPED if given.get(name) is not None), None)
        if cache is None or not is_filled(cache):
            use_cache = given.get("use_cache")
            caches = cache is not None or bool(self._uses_cache if use_cache is None else use_cache)
            self._begin_prompt(cache, hidden, caches=caches)
        else:
            self._begin_decoding(cache, hidden)

    def _begin_prompt(self, cache: Any, hidden: Tensor | None, *, caches: bool) -> None:
        """A batch that chooses; with a cache, for the tokens that follow it too.

        Raises:
            UserError: heads could not be dropped from the cache, or it serves graphs, in which nothing is chosen again.
        """
        one = Conversation(self._name, self._maker, self.digest()) if caches else None
        self.batch = batch = BatchInputs(conversation=one, remember=not self.frozen)
        batch.states = {block.key: block.state for block in self.blocks}
        batch.dense = caches and hidden is not None and self.runs_dense(*hidden.shape[:2])
        fixed = has_fixed_size(cache)
        if fixed and self.refresh is not None:
            raise UserError("refresh chooses while decoding, which caches of fixed size do in one graph: leave it out")
        if cache is not None:
            if batch.dense:
                check_can_narrow(cache)
            for block in self.blocks:
                if block.cached_heads is not None:
                    block.cached_heads.begin(cache, every=batch.dense)
        if not is_traced():
            self._begin(batch, hidden, to_decode=fixed)

    def _begin_decoding(self, cache: Any, hidden: Tensor | None) -> None:
        """A batch that continues a cache, under its choice or, every so many tokens, with channels chosen again.

        Raises:
            UserError: the cache belongs to no prompt of this model.
        """
        one, since = conversation_of(cache), None
        if one is None or not self._knows(one):
            raise UserError(
                "this key/value cache belongs to another model or pruning, whose heads are others: run its prompt again"
            )
        if one.recent is not None:
            length = cache.get_seq_length()
            one.recent.begin(length)
            if self.refresh is not None and one.recent.tokens >= self.refresh:
                since = one.recent
                one = one.branch(RecentInputs(length))  # copies of the cache go on with the old choice
        if not is_traced():
            self._hold(one)
        self.batch = BatchInputs(None if hidden is None else hidden.shape[:2], conversation=one, decoding=True)
        self.batch.since = since

    def enter_layers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the first layer: find the shape of a new batch, its real tokens and their positions.

        Raises:
            UserError: a position was never calibrated, or the mask is unreadable.
        """
        batch = self.batch
        if batch is None or batch.decoding:
            return
        given = dict(zip(self._layer_names, args, strict=False)) | dict(kwargs)
        hidden, told = given[self._layer_names[0]], self._here.given
        shape, positions = hidden.shape[:2], told.get("position_ids")
        # Without padding no mask is made for the layers, which needed a look at the data: no second one here.
        mask = None if given.get("attention_mask") is None and positions is None else told.get("attention_mask")
        batch.shape, batch.places = shape, self._places(shape, _real_tokens(mask, shape), positions)
        if batch.samples is None and self._samples is not None and self._samples.are_drawn(*shape):
            batch.samples = self._late_samples(shape[0], shape[1], hidden.device)

    @torch.compiler.disable(reason="samples are drawn outside of graphs: compile layer by layer, with compile_")
    def _late_samples(self, rows: int, tokens: int, device: torch.device) -> Tensor | None:
        """Of a graph of the whole model, which would hold those of one batch; and of images."""
        assert self._samples is not None
        batch = self.batch
        number = 0 if batch is None else self._number_of(batch)
        if batch is not None and batch.remember and batch not in self._running:  # a graph's are counted here alone
            self.num_batches += 1
        return self._samples.of_batch(rows, tokens, number, device)

    def _number_of(self, batch: BatchInputs) -> int:
        """What its random samples are drawn by. Batches that leave no trace are not counted."""
        others = sum(other.remember for other in self._running if other is not batch)
        return self.num_batches + (others if batch.remember else 0)

    def _begin(self, batch: BatchInputs, hidden: Tensor | None, *, to_decode: bool) -> None:
        """What a batch needs that graphs cannot make: memory, and random numbers."""
        with self._lock.taken():
            number = self._number_of(batch)
            self._running.add(batch)
        if hidden is not None and self._samples is not None:
            batch.samples = self._samples.of_batch(hidden.shape[0], hidden.shape[1], number, hidden.device)
        weights = (block.runner.slices.like for block in self.blocks)
        like = next((weight for weight in weights if weight is not None), None)
        batch.buffer = None if like is None else self.memory.take(like)
        one = batch.conversation
        leaves = (self.decodes and not batch.dense) or to_decode
        if one is not None and leaves and not torch.is_grad_enabled():
            self._hold(one)
            batch.rooms = {
                block.key: memory
                for block, memory in zip(self.blocks, one.room or (), strict=True)
                if memory is not None
            }

    def end_batch(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Forward hook of the module that loops over the layers: states move, and the cache is told its choice."""
        batch, given = self.batch, self._here.given
        cache = cache_in(given)
        if batch is not None and batch.decoding:
            self._end_decoding(batch, cache)
        elif batch is not None and self.part is not None:
            self._remember(batch, [block for block in self.blocks if block.index == self.part])
        elif batch is not None and len(batch.results) == len(self.blocks):
            self._end_prompt(batch, getattr(output, CACHE, None) if cache is None else cache)
        self._leave_batch()

    def _end_prompt(self, batch: BatchInputs, cache: Any) -> None:
        results = [batch.results[block.key] for block in self.blocks]
        self.last = choices = [_kept(result.choice) for result in results]
        self._remember(batch, self.blocks)
        one = batch.conversation
        if one is None or cache is None:
            return
        one.choices = choices
        if self.refresh is not None:
            one.recent = RecentInputs(cache.get_seq_length())
        for block, choice in zip(self.blocks, choices, strict=True):
            if batch.dense and block.cached_heads is not None:
                block.cached_heads.narrow(cache, choice.kept)
        begin_with(cache, one)
        if has_fixed_size(cache) and not is_traced():
            # decoded with in graphs: what is made inside of one is gone with the next token
            self._hold(one)
            for block in self.blocks:
                block.choice_of(one)
                keep_addresses(one.slice_of(block.number, block.runner.slices).values())

    def _end_decoding(self, batch: BatchInputs, cache: Any) -> None:
        """Count the tokens that a later choice is made from."""
        one = batch.conversation
        if one is None or one.recent is None:
            return
        one.recent.tokens += batch.shape[1]
        if batch.since is not None:
            begin_with(cache, one)
            self.last = list(one.choices)

    def _remember(self, batch: BatchInputs, blocks: Sequence[Any]) -> None:
        """Move the states of these blocks by one batch, if it is finite and to be remembered."""
        if not batch.remember:
            return
        results = [batch.results[block.key] for block in blocks]
        moments = [result.moment for result in results if result.moment is not None]
        finite = all_finite(moments) if moments else None
        with self._lock.taken():
            alone = is_traced() or all(other is batch for other in self._running)
            if finite is not None:
                for block, result in zip(blocks, results, strict=True):
                    block.remember(result, finite, in_place=alone)
            if not is_traced():
                self.num_batches += 1
                self._running.discard(batch)  # so that it is not counted twice
        if finite is not None and not is_traced():
            self.skipped.add(finite)

    def tensors(self) -> dict[str, Tensor]:
        """Histories and running means by name: ``history.3.mlp``."""
        return {
            f"{kind}.{block.index}.{block.block.value}": tensor
            for block in self.blocks
            for kind, tensor in block.state._asdict().items()
            if tensor is not None
        }

    def load(self, tensors: Mapping[str, Tensor], num_batches: int) -> None:
        """Put what :meth:`tensors` gave, or copies of it, into place."""
        with self._lock.taken():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])
            self.num_batches = num_batches

    def _leave_batch(self) -> None:
        """Forget this thread's batch: it has ended, or failed."""
        batch, self.batch, self.leaving = self.batch, None, None
        self._here.given = {}
        if batch is None or is_traced():
            return
        self.memory.give_back(batch.buffer)
        with self._lock.taken():
            self._running.discard(batch)

    def _hold(self, one: Conversation) -> None:
        self.decodes = True
        self.held.use(one, [block.runner.slices for block in self.blocks])

    def _knows(self, one: Conversation) -> bool:
        """Whether a conversation was begun by this model, or by a copy that has the same weights."""
        if one.pruning != self._name:
            return False
        if one.maker == self._maker or one.maker in self._kin:
            return True
        if is_traced() or one.weights != self.digest():
            return False
        self._kin.add(one.maker)
        return True

    def digest(self) -> str:
        """Of the weights of the layers that are pruned, as they were when first asked for."""
        if self._weights is None:
            layers = {id(layer): layer for layer in (block.runner.modules.layer for block in self.blocks)}
            self._weights = ".".join(fingerprint(layer) for layer in layers.values())
        return self._weights

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a layer under parallel probing: its residual is what the MLP's probe is taken from."""
        if self.batch is not None and not self.batch.decoding:
            given = dict(zip(self._layer_names, args, strict=False)) | dict(kwargs)
            self.batch.entered = self._earlier(given[self._layer_names[0]])

    def see_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of attention, where tokens are weighed by what they got of it, over heads and queries."""
        if self.batch is not None and not self.batch.decoding:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            self.batch.attended = weights.float().sum((1, 2)) if isinstance(weights, Tensor) else None

    def between_blocks(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of what meets the residual in front of an MLP: the next layer's attention probes it."""
        if self.batch is not None and not self.batch.decoding:
            self.batch.middle = self._earlier(self.batch.as_batch(args[0]))

    def side_stream(self, device: torch.device) -> SideStream | None:
        """The stream of parallel probes; None where there is nothing to gain from one."""
        if device.type == "cpu" or not self.overlaps or is_traced():
            return None
        if self._side is None or self._side.device != device:
            self._side = SideStream(device)
        return self._side

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which begin between two batches."""
        return {
            **self.__dict__,
            "_here": None,
            "_running": None,
            "_weights": None,
            "_maker": uuid4().hex,
            "_kin": set(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = threading.local()
        self._running = WeakSet()

    def _earlier(self, residual: Tensor) -> Earlier:
        side = self.side_stream(residual.device)
        return Earlier(residual, None if side is None else side.moment())

    def _places(self, shape: torch.Size, real: Tensor | None, position_ids: Tensor | None) -> TokenPositions | None:
        tokens = shape[1]
        if position_ids is not None:
            if real is None:
                real = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
            positions = position_ids.expand(shape)
            needed = int(torch.where(real, positions, 0).max()) + 1
            return TokenPositions(positions, real, self._room_for(needed, tokens))
        if real is not None:
            positions, needed = real.long().cumsum(1) - 1, tokens
            if self.num_positions is not None and tokens > self.num_positions:
                needed = int(positions.max()) + 1  # padding may account for the excess; worth a look only here
            return TokenPositions(positions, real, self._room_for(needed, tokens))
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


def _kept(choice: Choice) -> Choice:
    """A choice that outlives inference mode, for those who go on outside of it."""
    if is_traced() or not choice.kept.is_inference():
        return choice
    with torch.inference_mode(False):
        return choice._replace(**{name: one.clone() for name, one in choice._asdict().items() if one is not None})
