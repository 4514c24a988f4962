"""What a self-check raises."""


class Mismatch(Exception):
    """An op and its reference disagree; the text says where."""
