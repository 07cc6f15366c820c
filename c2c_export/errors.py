"""The errors that a user sees: one or two lines that say what was found, what was expected and what to do."""


class C2CError(Exception):
    """A failure with a message for the user. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(C2CError):
    """A wrong argument: a path that does not exist, an option out of range, an empty or over-long prompt."""

    exit_code = 2


class BundleError(C2CError):
    """A bundle that is missing, damaged, changed, or of another schema version. The message names the file."""
