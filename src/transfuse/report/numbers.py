"""How numbers are written in a report, the same on the page and in the terminal. ASCII only, by intent."""

from __future__ import annotations

from transfuse.report.schema import Interval


def number(value: float) -> str:
    """Four decimals for what a metric usually is, fewer where the number is large."""
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def signed(value: float) -> str:
    """A gain: its sign always shown."""
    return ("+" if value >= 0 else "") + number(value)


def bounds(interval: Interval) -> str:
    """`[0.9080, 0.9170]`."""
    return f"[{number(interval.low)}, {number(interval.high)}]"


def signed_bounds(interval: Interval) -> str:
    """`[-0.0012, +0.0170]`."""
    return f"[{signed(interval.low)}, {signed(interval.high)}]"


def percent(fraction: float) -> str:
    """`95 %`."""
    return f"{100 * fraction:.3g} %"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `5 h 02 min`."""
    if seconds < 59.95:  # above, one decimal rounds to 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float, unit: str = "") -> str:
    """A large count with a decimal prefix: `11.2 M`, `44.7 MB`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()
