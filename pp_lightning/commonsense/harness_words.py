"""What is typed for ``pp-lightning lm-eval``, as lm-evaluation-harness takes it."""

from collections.abc import Sequence

from pp_lightning.data.base import PAPER_SAMPLES
from pp_lightning.errors import UserError

# Options of other commands, and what they are called in the harness's model_args.
_SHARED = {
    "--method": "method",
    "--model.method": "method",
    "--model.path": "path",
    "--model.pruning_ratio": "pruning_ratio",
    "--data.calibration": "calibration",
    "--data.calibration_samples": "calibration_samples",
}


def with_model_args(words: Sequence[str]) -> list[str]:
    """Options that other commands have too as the model's arguments: ``--method pp`` becomes ``method=pp`` there."""
    rest, given, arguments = list(words), list[str](), list[str]()
    while rest:
        option, sign, value = rest.pop(0).partition("=")
        if option == "--paper":
            arguments.append(f"calibration_samples={PAPER_SAMPLES}")
        elif option in (*_SHARED, "--model_args"):
            if not sign and not rest:
                raise UserError(f"{option} needs a value")
            value = value if sign else rest.pop(0)
            arguments.append(f"{_SHARED[option]}={value}" if option in _SHARED else value)
        else:
            given.append(option + sign + value)
    return [*given, *(["--model_args", ",".join(arguments)] if arguments else [])]
