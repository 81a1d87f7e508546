"""The one exception whose text is meant for the user."""


class UserError(Exception):
    """A mistake of the user's: the text is one clear line that says what to change. Exit code 2.

    The text must hold no PHI: no identifier, no path below a source folder, no header value.
    """

    exit_code = 2
