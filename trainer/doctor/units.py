"""Numbers, seconds and rates, as a line of the table has them."""


def count_of(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}s"


def format_rate(bandwidth: float) -> str:
    """Bytes a second in bits, as networks count: `20 Mbit/s`, `9.41 Gbit/s`."""
    bits = 8 * bandwidth
    if bits < 1e9:
        return f"{bits / 1e6:.3g} Mbit/s"
    return f"{bits / 1e9:.3g} Gbit/s"


def format_duration(seconds: float) -> str:
    """`43 µs`, `2.3 ms`, `3.0 s`, `60 min`."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.1f} ms"
    if seconds < 300:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
