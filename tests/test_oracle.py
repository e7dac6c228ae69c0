"""Parity with numbers recorded from the published implementation: ``oracle/`` of PP_LIGHTNING_DATA."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pp_lightning import calibrate, frozen_history, kept_units, prune_
from pp_lightning.blocks import Block
from tests.models import histories
from tests.recording import Record, RecordingFullBatchProbing, RecordingProbePruning, RecordingWandaSP

LAYERS = (3, 4, 5)
NAMES = {"attention": "attn", "mlp": "mlp"}
BLOCKS = [(layer, block) for layer in LAYERS for block in NAMES]
BATCHES = (
    0,
    0,
    1,
    2,
    3,
    4,
)  # row of the recorded arrays -> evaluation batch; row 0 is a warm-up without history update
RELATIVE, LOGITS = 1e-4, 1e-4

RUNS = {
    "pp_sync_0.2": (lambda: RecordingProbePruning(), 0.2),
    "pp_sync_0.4": (lambda: RecordingProbePruning(), 0.4),
    "pp_asyncintra_0.4": (lambda: RecordingProbePruning(probe_source="previous"), 0.4),
    "full_nohist_0.4": (lambda: RecordingFullBatchProbing(), 0.4),
    "wandasp_0.4": (lambda: RecordingWandaSP(), 0.4),
}
DYNAMIC = [name for name in RUNS if name != "wandasp_0.4"]
WITH_HISTORY = [name for name in RUNS if name.startswith("pp_")]


class Run:
    """One recorded run repeated with this library; every list has one entry a row."""

    def __init__(self, folder: Path, model: LlamaForCausalLM, statistics, name: str | None) -> None:
        self.recorded = dict(np.load(folder / f"{name or 'dense'}.npz"))
        self.logits: list[Tensor] = []
        self.hidden: list[dict[int, Tensor]] = []
        self.output_hidden: list[tuple[Tensor, ...]] = []
        self.kept: list[dict] = []
        self.choices: list[dict[tuple[int, str], Record]] = []
        self.histories: list[dict[tuple[int, str], Tensor]] = []
        self.ids = [torch.tensor(x).long() for x in np.load(folder / "inputs.npz")["eval_ids"]]
        self.method = None
        if name is not None:
            build, ratio = RUNS[name]
            self.method = build()
            prune_(model, self.method, statistics, pruning_ratio=ratio, round_to=16)
        self._run(model)

    def _run(self, model: LlamaForCausalLM) -> None:
        after: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda _, __, output, index=index: after.__setitem__(index, output))
        for row, batch in enumerate(BATCHES):
            frozen = frozen_history(model) if row == 0 and self.method else contextlib.nullcontext()
            with torch.no_grad(), frozen:
                result = model(input_ids=self.ids[batch], use_cache=False, output_hidden_states=True)
            self.logits.append(result.logits)
            self.output_hidden.append(result.hidden_states)
            self.hidden.append(dict(after))
            if self.method is not None:
                self.kept.append(kept_units(model))
                self.histories.append(histories(model))
            if hasattr(self.method, "taken"):
                self.choices.append(self.method.taken(LAYERS))

    def array(self, key: str, row: int) -> Tensor:
        return torch.tensor(self.recorded[key][row])

    def nll(self, row: int) -> Tensor:
        ids = self.ids[BATCHES[row]]
        return F.cross_entropy(self.logits[row][:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    return data_dir / "oracle" / "llama_mha"


@pytest.fixture(scope="module")
def new_model(folder: Path):
    config = LlamaConfig.from_json_file(folder / "config.json")
    weights = {name: weight.float() for name, weight in load_file(folder / "weights.safetensors").items()}

    def build() -> LlamaForCausalLM:
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(weights)
        return model

    return build


@pytest.fixture(scope="module")
def statistics(folder: Path, new_model):
    batches = [{"input_ids": torch.tensor(x).long()} for x in np.load(folder / "inputs.npz")["calib_ids"]]
    return calibrate(new_model(), batches, progress=False)


@pytest.fixture(scope="module")
def runs(folder: Path, new_model, statistics):
    done: dict[str | None, Run] = {}

    def run(name: str | None) -> Run:
        if name not in done:
            done[name] = Run(folder, new_model(), statistics, name)
        return done[name]

    return run


def close(found: Tensor, recorded: Tensor) -> None:
    """Equal to 1e-4, relative to the largest value of the array where a value is near zero."""
    torch.testing.assert_close(found, recorded, rtol=RELATIVE, atol=RELATIVE * recorded.abs().max().item())


def elementwise_close(found: Tensor, recorded: Tensor) -> None:
    torch.testing.assert_close(found, recorded, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_calibration_history(folder, statistics, layer, block):
    recorded = np.load(folder / "calib_history_wandasp.npz")
    name = NAMES[block]
    elementwise_close(
        statistics.second_moment(layer, Block(block)), torch.tensor(recorded[f"L{layer}_{name}_scaler_inp"])
    )
    samples = torch.tensor(recorded[f"L{layer}_{name}_nsamples"])
    assert (samples == statistics.counts[0]).all()  # 8 batches of 4 rows at every position
    assert statistics.counts.tolist() == [32.0] * 64


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_probe_rows_and_tokens(runs, name, layer, block):
    run = runs(name)
    for row, choice in enumerate(run.choices):
        probe = choice[layer, block].probe
        rows, tokens = (run.array(f"L{layer}_{NAMES[block]}_probe_{what}", row) for what in ("bsz", "seq"))
        found = (range(20), range(64)) if probe is None else (probe.rows.tolist(), probe.tokens.tolist())
        assert rows[rows >= 0].sort().values.tolist() == list(found[0])
        assert tokens[tokens >= 0].sort().values.tolist() == list(found[1])


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_scores(runs, name, layer, block):
    run = runs(name)
    for row, choice in enumerate(run.choices):
        elementwise_close(choice[layer, block].scores, run.array(f"L{layer}_{NAMES[block]}_score", row))


@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_wanda_scores(runs, layer, block):
    run = runs("wandasp_0.4")
    recorded = run.array(f"L{layer}_{NAMES[block]}_score", 0)  # of each channel
    per_unit = recorded.view(8, -1).sum(1) if block == "attention" else recorded
    elementwise_close(run.method.scores[layer, block], per_unit)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layer", LAYERS)
def test_kept_units(runs, name, layer):
    run = runs(name)
    for row, kept in enumerate(run.kept):
        recorded_row = 0 if name.startswith("wandasp") else row
        assert kept[layer].attention.tolist() == sorted(run.array(f"L{layer}_attn_kept_heads", recorded_row).tolist())
        assert kept[layer].mlp.tolist() == sorted(run.array(f"L{layer}_mlp_kept", recorded_row).tolist())


@pytest.mark.parametrize("name", ["pp_sync_0.4", "pp_asyncintra_0.4"])
@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_probe_states(runs, name, layer, block):
    run = runs(name)
    recorded = torch.tensor(run.recorded[f"L{layer}_{NAMES[block]}_probe_out_b1"])
    close(run.choices[1][layer, block].states, recorded)


@pytest.mark.parametrize("name", WITH_HISTORY)
@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_history_after_each_batch(runs, name, layer, block):
    run = runs(name)
    for row, found in enumerate(run.histories):
        elementwise_close(found[layer, block].sum(0), run.array(f"L{layer}_{NAMES[block]}_hist_colsum", row))


@pytest.mark.parametrize("name", ["pp_sync_0.4", "pp_asyncintra_0.4"])
@pytest.mark.parametrize(("layer", "block"), BLOCKS)
def test_final_history(runs, name, layer, block):
    run = runs(name)
    recorded = torch.tensor(run.recorded[f"L{layer}_{NAMES[block]}_hist_final"])
    elementwise_close(run.histories[-1][layer, block], recorded)


@pytest.mark.parametrize("name", [None, *RUNS])
def test_logits_and_loss(runs, name):
    run = runs(name)
    rows, columns = (torch.tensor(run.recorded[f"logits_{what}"]) for what in ("samples", "positions"))
    # The recorded row 0 of the static run is dense, which is what the first row of the dense run shows.
    for row in range(1 if name == "wandasp_0.4" else 0, len(BATCHES)):
        found = run.logits[row]
        torch.testing.assert_close(
            found[rows[:, None], columns[None, :]], run.array("logits_slice", row), rtol=0, atol=LOGITS
        )
        torch.testing.assert_close(run.nll(row), run.array("nll", row), rtol=0, atol=LOGITS)
        assert run.nll(row).mean().item() == pytest.approx(run.recorded["loss"][row], abs=LOGITS)
        assert found.abs().mean().item() == pytest.approx(run.recorded["logits_abs_mean"][row], abs=LOGITS)
    perplexity = torch.stack([run.nll(row) for row in range(1, 6)]).double().mean().exp().item()
    assert perplexity == pytest.approx(run.recorded["metric_Perplexity"].item(), rel=RELATIVE)


@pytest.mark.parametrize("name", [None, "pp_sync_0.4", "pp_asyncintra_0.4", "full_nohist_0.4", "wandasp_0.4"])
def test_hidden_states(runs, name):
    run = runs(name)
    rows, columns = (torch.tensor(run.recorded[f"logits_{what}"]) for what in ("samples", "positions"))
    for layer in range(6):
        hidden = run.hidden[1][layer]
        close(hidden[rows[:, None], columns[None, :]], torch.tensor(run.recorded[f"hidden_after_layer_{layer}_b1"]))
        if layer < 5:  # transformers gives the last one after the final norm
            assert torch.equal(run.output_hidden[1][layer + 1], hidden)


def test_every_recorded_array_is_compared(folder):
    """An array added to the record without a test here would go unnoticed."""
    compared = [
        "_scaler_inp",
        "_nsamples",
        "_probe_bsz",
        "_probe_seq",
        "_score",
        "_kept_heads",
        "_kept",
        "_probe_out_b1",
        "_hist_colsum",
        "_hist_final",
        "logits_slice",
        "logits_samples",
        "logits_positions",
        "logits_abs_mean",
        "nll",
        "loss",
        "metric_Perplexity",
    ]
    for path in folder.glob("*.npz"):
        if path.name == "inputs.npz":
            continue
        for key in np.load(path):
            known = (
                key == "batch_index" or key.startswith(("_bi_", "hidden_after_layer_")) or key.endswith(tuple(compared))
            )
            assert known, f"{path.name}: {key}"
