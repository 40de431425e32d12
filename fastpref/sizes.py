"""Numbers of bytes as people read them."""

GIB = 1 << 30


def in_words(count: int) -> str:
    """A number of bytes in GiB, or in MiB below half a GiB: "1.50 GiB", "3.4 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 2 else f"{count / 2**20:.1f} MiB"
