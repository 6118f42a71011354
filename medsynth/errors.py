"""The one exception that means "the user can mend this"."""

from medsynth.exit_codes import USER_ERROR


class UserError(ValueError):
    """A mistake in a config, a data set, a weights folder or a command line.

    The message is what the user reads: it names the file, row or key and the mend. The command line prints it without a
    traceback and leaves with `exit_code`.
    """

    exit_code = USER_ERROR
