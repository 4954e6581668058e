"""Quantities as text, and figures that several programs derive: pure functions."""

from __future__ import annotations

import math
import re

LONGEST_S = 1e11  # some 3,000 years; a longer time, or NaN, is shown as a plain number


def tokens_per_s(tokens: int, seconds: float) -> float:
    """Tokens per second over an interval; 0 for an empty interval."""
    return tokens / seconds if seconds > 0 else 0.0


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def eta(step: int, steps: int, step_s: float) -> float:
    """Seconds until step ``steps``, after ``step`` steps of ``step_s`` seconds each."""
    return max(steps - step, 0) * step_s


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 step, 2 steps, 1,000 steps."""
    return f"{number:,} {noun if number == 1 else plural or plural_of(noun)}"


def row(number: int, noun: str) -> str:
    """Things that follow each other, as the subject of a sentence: 1 step was, 2 steps in a row
    were."""
    return f"{count(number, noun)} {'was' if number == 1 else 'in a row were'}"


def plural_of(noun: str) -> str:
    """The plural of a noun: steps, batches."""
    return f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def amount(number: float, noun: str) -> str:
    """A large number and its noun: 1 token, 6.43K tokens."""
    return f"{show_number(number)} {noun if number == 1 else noun + 's'}"


def show_number(n: float) -> str:
    """A number with three significant digits and a suffix: 6.74B, 512, 4.19M."""
    return _scaled(n, 1000, ("", "K", "M", "B", "T"))


def show_bytes(n: float) -> str:
    """A size with three significant digits in binary units: 1.50 GiB, 512 B."""
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def show_rate(n: float) -> str:
    """A number of bytes a second with three significant digits: 8.80 GB/s, 310 MB/s."""
    return _scaled(n, 1000, (" B/s", " KB/s", " MB/s", " GB/s"))


def show_flops(n: float) -> str:
    """A number of operations with three significant digits: 20.3 TFLOP, 524 kFLOP."""
    return _scaled(n, 1000, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def read_bytes(text: str) -> int:
    """The size that a text states: 512, 64MiB, 64 MB or 1.5g; ValueError for any other text.

    KiB, MiB and GiB are powers of 1024; K, M, G, KB, MB and GB powers of 1000.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:([kmg])(i?)b?|b)?", text.strip(), re.I)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 64MiB or 2GB")
    number, prefix, binary = match.groups()
    scale = "kmg".index(prefix.lower()) + 1 if prefix else 0
    return round(float(number) * float(1024 if binary else 1000) ** scale)


def _scaled(n: float, base: int, suffixes: tuple[str, ...]) -> str:
    if not abs(n) < base ** (len(suffixes) + 1):  # also NaN
        return f"{n / base ** (len(suffixes) - 1):.3g}{suffixes[-1]}"
    for suffix in suffixes:
        if n >= base and suffix != suffixes[-1]:
            n /= base
            continue
        digits = 0 if n >= 99.95 or float(n).is_integer() else 1 if n >= 9.995 else 2
        if float(f"{n:.{digits}f}") < base or suffix == suffixes[-1]:
            break
        n /= base
    return f"{n:.{digits}f}{suffix}"


def show_time(seconds: float) -> str:
    """A duration: 0.25s, 42s, 3m05s, 2h07m, 5d03h."""
    if seconds < 9.995 or not seconds < LONGEST_S:
        return f"{seconds:.2f}s" if abs(seconds) < LONGEST_S else f"{seconds:.3g}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{m}m{s:02}s" if minutes else f"{s}s"


def show_fine_time(seconds: float) -> str:
    """A duration with three digits also where it is short: 3.46ms, 0.25s, 42s."""
    return f"{1e3 * seconds:.3g}ms" if 0 < seconds < 0.0995 else show_time(seconds)
