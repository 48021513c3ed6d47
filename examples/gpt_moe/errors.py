"""The one exception that means: the user can fix this, so show the sentence and no traceback."""


class ExampleError(ValueError):
    """A mistake in the command, the data or the output folder; the message says what to do."""
