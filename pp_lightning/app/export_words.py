"""What ``pp-lightning export`` tells: what a layout costs, whom it suits."""

from rich.console import Console

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.report import Grid, show_grid
from pp_lightning.export import Costs, Layout, compare_layouts
from pp_lightning.export.costs import in_words
from pp_lightning.export.layouts import target_for
from pp_lightning.export.quantisers import shared_among, suits
from pp_lightning.export.sizes import PrunedSizes
from pp_lightning.families import shape_of


def say(text: str) -> None:
    """Write a line for whoever started the command."""
    Console().print(text, highlight=False, soft_wrap=True)


def say_what_layouts_cost(module: PrunedLM, layout: Layout) -> None:
    """What every layout costs and keeps, whom the chosen one suits, and what became of shared keys."""
    headings = (
        *("layout", "class", "parameters", "of dense", "added", "FLOPs", "GB"),
        *("heads", "kv heads", "channels", "loads in"),
    )
    rows = [_cells(costs, layout) for costs in compare_layouts(module.model)]
    show_grid(Grid("what each layout of this choice costs and keeps", headings, rows))
    _say_what_suits(module, layout)
    if PrunedSizes.of(module.model).key_heads:
        say(
            "single query heads went out of groups that share keys and values: each one that stays is written with "
            "keys and values of its own (counted under added)"
        )


def _say_what_suits(module: PrunedLM, layout: Layout) -> None:
    """Quantisers that these widths do not suit, and how many devices can share them."""
    layers, shape = target_for(layout, module.model).layers, shape_of(module.model.config)
    if module.settings.uniform_heads:
        heads, channels = layers[0].heads, [widths.channels for widths in layers]
        say(f"uniform heads: {heads} in every layer; MLPs keep {min(channels)} to {max(channels)} channels")
    counted = suits(layers, shape.head_size, shape.hidden_size)
    unsuited = [f"{name}: {number}" for name, number in counted.items() if number]
    if unsuited:
        say(f"matrices whose rows a quantiser leaves wider or refuses (choose --model.round_to): {'; '.join(unsuited)}")
    devices = shared_among(layers)
    say(f"tensor parallelism: heads and channels divide among {', '.join(map(str, devices)) or 'no number of'} devices")


def _cells(costs: Costs, chosen: Layout) -> tuple[str, ...]:
    name = f"-> {costs.layout}" if costs.layout == chosen else f"   {costs.layout}"
    if not costs.parameters:
        return name, *["-"] * 9, costs.model_class
    return (
        name,
        costs.model_class,
        f"{costs.parameters:,}",
        f"{costs.parameters_ratio:.3f}",
        f"{costs.added_parameters:,}",
        f"{costs.flops_ratio:.3f}",
        f"{costs.bytes / 1e9:.3f}",
        in_words(costs.heads),
        in_words(costs.key_heads),
        in_words(costs.channels),
        costs.loads_in,
    )
