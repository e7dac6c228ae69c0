"""Pruned models as files that unmodified tools load. Needs no Lightning."""

from pp_lightning.export.checkpoint import export_checkpoint
from pp_lightning.export.costs import Costs, compare_layouts
from pp_lightning.export.graphs import export_dynamic_graph, export_graph
from pp_lightning.export.layouts import Layout
from pp_lightning.export.verify import Agreement

__all__ = [
    "Agreement",
    "Costs",
    "Layout",
    "compare_layouts",
    "export_checkpoint",
    "export_dynamic_graph",
    "export_graph",
]
