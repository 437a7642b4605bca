"""The one error that is the user's to mend; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Says what is wrong, where (file, field or stage) and how to mend it.

    Raised anywhere; turned into one line and a non-zero exit code only at the door (`__main__`).
    """
