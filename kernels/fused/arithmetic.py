"""Integer arithmetic of launches. (Triton's own functions of this kind are slow on the host.)"""


def parts(size: int, part: int) -> int:
    """Parts of at most `part` that make up `size`."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not below `size`."""
    return 1 << (size - 1).bit_length()
