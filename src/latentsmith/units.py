"""Numbers as a person reads them."""

BYTES = ("B", "KiB", "MiB", "GiB")
OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")


def scaled(number: float, units: tuple[str, ...], step: int) -> str:
    """Return a number in the largest unit that leaves at least 1 of it."""
    for unit in units[:-1]:
        if number < step:
            return f"{number:.3g} {unit}"
        number /= step
    return f"{number:,.1f} {units[-1]}"


def duration(seconds: float) -> str:
    """Return a time as minutes and seconds, "0:41", or with hours, "1:02:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"
