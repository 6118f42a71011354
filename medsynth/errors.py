"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, a data set, a weights folder or a command line.

    The message is what the user reads: it names the file, row or key and the mend. The command line prints it without a
    traceback and leaves with exit code 2.
    """
