"""What a command ends with, besides success and failures of its own."""


class BadInput(Exception):
    """Something given to us is wrong: the message is one line naming the thing, the value and the fix (exit code 2)."""


class Stopped(Exception):
    """Work was asked to stop, kept what it had done, and goes on when it is started again.

    code: the exit code: 130 after Ctrl-C, 75 (a temporary failure: start it again) after SIGTERM or SIGUSR1.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
