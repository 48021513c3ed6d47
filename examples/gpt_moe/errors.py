"""The exceptions that mean: the user can fix this, so show the sentence and no traceback."""


class ExampleError(ValueError):
    """A mistake in the command, the data or the output folder; the message says what to do."""


class LoneError(ExampleError):
    """One that this rank meets and others may not: each that does tells it."""
