"""What users are told: a mistake of theirs in one line, and who says it."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(Exception):
    """A mistake that the user can mend. The message is one line that names the thing and the remedy."""


class InputError(UserError, ValueError):
    """An image or a latent of another form than a network takes."""


class NotInstalledError(UserError, ImportError):
    """A library that pip does not install by itself is not there."""


class RankError(UserError):
    """A condition that one rank alone met, so that it must say so itself."""
