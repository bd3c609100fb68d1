"""Exceptions with a meaning of their own for whoever started a command."""


class BadInput(Exception):
    """An input is wrong. The message is one line that names the thing, the value and the fix (exit code 2)."""


class Stopped(Exception):
    """Work was asked to stop, kept what it had done, and goes on when it is started again.

    code: the exit code: 130 after Ctrl-C, 75 (a temporary failure: start it again) after SIGTERM or SIGUSR1.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
