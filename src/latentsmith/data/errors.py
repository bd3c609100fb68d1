"""Define the error of one sample, as against a whole source."""

from latentsmith.files.errors import BadInput


class BadSample(BadInput):
    """A sample that cannot be used. `reason` is a few words to count by ("truncated", "empty caption"), the message the
    whole story; an import sets such a sample aside, a run that meets one stops."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
