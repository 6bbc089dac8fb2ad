"""Why a recording is left out."""


class BadRecordingError(Exception):
    """A recording that cannot be used; the message continues "recording NAME …"."""


class SkippedError(Exception):
    """A recording that the settings leave out; the message continues likewise."""
