"""The errors that a user sees: one or two lines that say what was found, what was expected and what to do."""


class C2CError(Exception):
    """A failure with a message for the user. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(C2CError):
    """A wrong argument: a path that does not exist, an option out of range, an empty or over-long prompt."""

    exit_code = 2


class PromptTooLongError(UsageError):
    """A prompt, or a prompt with the answer that is asked for, beyond the bundle's capacity."""


class AnswerTooLongError(PromptTooLongError):
    """A prompt that has room, but not with so long an answer."""


class PromptError(C2CError):
    """Messages that a chat template cannot take, or that those of two models do not keep alike."""


class BundleError(C2CError):
    """A bundle that is missing, damaged, changed, or of another schema version. The message names the file."""


_MAX_REASON = 300


def reason_of(error: BaseException) -> str:
    """What another library's exception says, in one line of at most 300 characters; its class's name if nothing.

    Not its first line alone: validation errors name the field there and the reason below.
    """
    return one_line(str(error), _MAX_REASON) or type(error).__name__


def one_line(text: str, max_length: int) -> str:
    """`text` in one line, cut to `max_length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else line[:max_length] + " …"


def install_command(extra: str | None = None) -> str:
    """What to type to install this package, with an extra if one is given, and where, as no index has it."""
    what = "." if extra is None else f"-c constraints.txt '.[{extra}]'"
    return f"pip install {what} (in a clone of c2c-export)"
