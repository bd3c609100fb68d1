"""The one exception that says a person can mend it."""


class BadInput(Exception):
    """Something given to us is wrong: the message is one line naming the thing, the value and the fix (exit code 2)."""
