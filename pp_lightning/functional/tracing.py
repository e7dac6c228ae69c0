"""Whether code runs, or becomes part of a graph."""

import torch


def is_traced() -> bool:
    """Whether what is being run becomes part of a graph that is compiled or exported.

    ``torch.compiler.is_compiling()`` is true for all threads of the process while one of them compiles.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
