"""What several threads on one model take in turn."""

from contextlib import AbstractContextManager, nullcontext
from threading import RLock

import torch


class Lock:
    """A lock that copies of a model do not share."""

    def __init__(self) -> None:
        self._lock = RLock()

    def taken(self) -> AbstractContextManager[object]:
        """Within this context by one thread at a time. Graphs are made by one thread at a time anyway."""
        return nullcontext() if torch.compiler.is_dynamo_compiling() else self._lock

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
