"""The one exception that a user's mistake raises."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the caller asked for or supplied.

    The message is one line and says what to change. The command line prints it and exits with code 2;
    library callers catch it as the ``ValueError`` it is. Our own bugs never raise it.
    """


def unknown(kind: str, given: object, names: Iterable[str]) -> UserError:
    """The error for a name that is not there: the nearest names, or all of them where none is near."""
    names = list(names)
    lower = {name.lower(): name for name in reversed(names)}  # the first of two that differ in case only
    near = [lower[name] for name in get_close_matches(str(given).lower(), lower, n=2)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"
    return UserError(f"there is no {kind} {str(given)!r}: {hint}")
