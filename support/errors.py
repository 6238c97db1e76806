"""The two exceptions that a job answers without a traceback (see `cli.job`)."""


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do.

    Jobs print it and exit with code 2.
    """


class Stopped(Exception):
    """A signal ended the work before its end; the message says where it goes on.

    Jobs print it and exit with code 128 + `signal`, as shells report it.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
