"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the caller asked for or supplied.

    The message is one line and says what to change. The command line prints it and exits with code 2;
    library callers catch it as the ``ValueError`` it is. Our own bugs never raise it.
    """
