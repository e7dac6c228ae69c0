"""Pruned models on an accelerator, as far as that can be told without one: see :mod:`tests.stand_in_device`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand_in_device import CASES, DEVICE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FAULTY = {"waits": "DataDependentOutputException", "mixes": "two .*devices,? stand_in:0(,| and) cpu"}
SPREAD = [case for case in CASES if "spread" in case]
SOUND = [case for case in CASES if case not in FAULTY and case not in SPREAD]
# The batch itself, and what depends on it: everything else stays where it is.
MAY_MOVE = {
    "hidden",
    "batch_samples",
    "batch_entered_residual",
    "batch_middle_residual",
    "kwargs_attention_mask",
    "kwargs_position_ids",
    "kwargs_position_embeddings_0",
    "kwargs_position_embeddings_1",
}


@pytest.fixture(scope="module")
def found(request):
    """Findings of the wanted cases, from a process of its own."""
    wanted = {item.callspec.params["case"] for item in request.session.items if "found" in item.fixturenames}
    command = [sys.executable, "-m", "tests.stand_in_device", *sorted(wanted)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", SOUND)
def test_an_accelerator_waits_for_nothing_and_records_everything(found, case):
    """Batches, decoding and compiled layers ask for no value and mix no devices; and what CUDA graphs need holds: all
    of a graph is on the device, and what does not change with the batch stays in its place.
    """
    findings = found[case]
    assert findings["error"] is None
    assert findings["device"] == DEVICE
    assert findings["elsewhere"] == []
    moving = {name.removeprefix("l_").removesuffix("_") for name in findings["moving"]}
    assert "hidden" in moving <= MAY_MOVE
    assert findings["written"] == []  # histories move when the batch has ended
    decoding = findings["decoding"]
    assert (decoding["device"], decoding["elsewhere"]) == (DEVICE, [])
    assert set(decoding["moving"]) == {f"l_kwargs_{name}_" for name in ("input_ids", "position_ids", "attention_mask")}
    assert all(name.startswith("l_kwargs_past_key_values_layers_") for name in decoding["written"])


@pytest.mark.parametrize("case", SPREAD)
def test_a_model_over_several_devices(found, case):
    """With padding, drawn probes, parallel probing, decoding; statistics too."""
    assert found[case]["error"] is None
    assert found[case]["device"] == f"{DEVICE}:1"


@pytest.mark.parametrize("case", FAULTY)
def test_faults_are_found(found, case):
    assert re.search(FAULTY[case], found[case]["error"])
