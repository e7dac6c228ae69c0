"""Pruned models as files that unmodified tools load. Needs no Lightning."""

from export.checkpoint import export_checkpoint
from export.costs import Costs, compare_layouts
from export.graphs import export_dynamic_graph, export_graph
from export.layouts import Layout
from export.verify import Agreement

__all__ = [
    "Agreement",
    "Costs",
    "Layout",
    "compare_layouts",
    "export_checkpoint",
    "export_dynamic_graph",
    "export_graph",
]
