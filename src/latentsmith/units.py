"""Numbers as a person reads them."""

BYTES = ("B", "KiB", "MiB", "GiB")
OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")


def scaled(number: float, units: tuple[str, ...], step: int) -> str:
    """A number in the largest unit that leaves at least 1 of it."""
    for unit in units[:-1]:
        if number < step:
            return f"{number:.3g} {unit}"
        number /= step
    return f"{number:,.1f} {units[-1]}"
