"""The two exceptions that a job answers without a traceback: see `cli.job`."""


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do.

    Jobs print it and exit with code 2.
    """


def reason_of(error: BaseException | str) -> str:
    """The first line of what an error says, or its kind; of one of the system's, its words."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class Stopped(Exception):
    """A signal ended the work before its end; the message says where it goes on.

    Jobs print it and exit with code 128 + `signal`, as shells report it.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
