"""Time pruned models against dense ones. Needs torch and transformers only, so that it runs where nothing else is.

``python -m pp_lightning.benchmark --config FILE --out DIR``, or ``pp-lightning benchmark``, which adds a plot.
"""

from pp_lightning.benchmark.run import run_benchmark
from pp_lightning.benchmark.settings import BenchmarkSettings, Case, ModelChoice

__all__ = ["BenchmarkSettings", "Case", "ModelChoice", "run_benchmark"]
