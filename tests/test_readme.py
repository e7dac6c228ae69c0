"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch

from pp_lightning.checkpoints import load_model
from tests.models import calibration_batches, ids

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_lines_run():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 9
    model, text = load_model(), ids()  # ten layers: three can be left dense
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    place = {"model": model, "batches": calibration_batches(), "ids": text, "mask": torch.ones_like(text)}
    exec(code, place)
    assert place["logits"].shape == (*text.shape, model.config.vocab_size)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_files_and_commands_that_it_names_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"(?:configs|benchmarks|export|pp_lightning|tests)/[\w/.-]+\w", README):
        assert (root / path).exists(), path
    for command in re.findall(r"^pp-lightning (\S+)", README, re.MULTILINE):
        assert command in ("test", "compare", "ablate", "prune", "export", "fit", "lm-eval", "benchmark", "plan")
