"""Lines as an SVG picture: one small module, so that no plotting library is needed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

from tests.bench.result import Plot

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 80, 55
_COLOURS = ("#0969da", "#57606a", "#bc4c00", "#8250df", "#1a7f37")
_STYLE = "text{font:13px system-ui,sans-serif;fill:#24292f}.t{font-size:16px;font-weight:600}.g{stroke:#d0d7de}"


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels between `first` and `last`, at the ends of `ticks`."""

    ticks: list[float]
    first: float
    last: float
    scale: Callable[[float], float]

    def __call__(self, value: float) -> float:
        low, high = self.scale(self.ticks[0]), self.scale(self.ticks[-1])
        return self.first + (self.scale(value) - low) / ((high - low) or 1) * (self.last - self.first)


def svg(plot: Plot) -> str:
    """The picture of `plot`, its lines in their order."""
    points = [point for line in plot.lines.values() for point in line]
    scales = {name: math.log2 if name in plot.logarithmic else float for name in "xy"}
    ys = [y for _, y in points]
    across = _Axis(sorted({x for x, _ in points}), _LEFT, _WIDTH - _RIGHT, scales["x"])
    ticks = _powers(ys) if "y" in plot.logarithmic else _steps(max(ys))
    down = _Axis(ticks, _HEIGHT - _BOTTOM, _TOP, scales["y"])
    middle = (_TOP + _HEIGHT - _BOTTOM) // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">',
        f"<title>{escape(plot.title)}</title><style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff"/>',
        _text(_LEFT, 28, plot.title, "start", "t"),
        _text(_WIDTH / 2, _HEIGHT - 14, plot.x),
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(plot.y)}</text>',
    ]
    for y in down.ticks:
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(_text(_LEFT - 8, down(y) + 4, f"{y:g}", "end"))
    parts += [_text(across(x), _HEIGHT - _BOTTOM + 20, f"{x:g}") for x in across.ticks]
    place = float(_LEFT)
    for (name, line), colour in zip(plot.lines.items(), _COLOURS, strict=False):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4" fill="{colour}"/>' for x, y in line]
        parts.append(f'<rect x="{place:.0f}" y="46" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(place + 20, 53, name, "start"))
        place += 36 + 7.2 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _steps(top: float) -> list[float]:
    """Some five round numbers from 0 to `top` or above."""
    magnitude = 10.0 ** math.floor(math.log10(top / 5))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= top / 5)
    return [number * step for number in range(math.ceil(top / step) + 1)]


def _powers(values: Iterable[float]) -> list[float]:
    """1, 2, 5, 10, ... from the last below all `values` to the first above."""
    values = list(values)
    exponents = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    numbers = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    first = max(number for number in numbers if number <= min(values))
    last = min(number for number in numbers if number >= max(values))
    return [number for number in numbers if first <= number <= last]
