"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do.

    Jobs print it without a traceback and exit with code 2 (see `cli.job`).
    """
