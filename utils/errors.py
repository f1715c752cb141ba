"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a file, an option or a combination of them.

    The message names the file or option, the rule that it breaks and how to mend it. Entry points print
    it as one line and exit with code 2; it never shows as a stack trace.
    """
