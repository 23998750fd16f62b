"""Lines as an SVG picture: one small function, so that no plotting library is needed."""

import math
from collections.abc import Callable
from xml.sax.saxutils import escape

from tests.bench.result import Plot

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 80, 55
_COLOURS = ("#0969da", "#57606a", "#bc4c00", "#8250df", "#1a7f37")
_STYLE = "text{font:13px system-ui,sans-serif;fill:#24292f}.t{font-size:16px;font-weight:600}.g{stroke:#d0d7de}"


def svg(plot: Plot) -> str:
    """The picture of `plot`, its lines in their order, y from zero."""
    points = [point for line in plot.lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    step = _round_step(max(y for _, y in points) / 5)
    top = step * math.ceil(max(y for _, y in points) / step)
    scale: Callable[[float], float] = math.log2 if plot.logarithmic else float
    first, last = scale(xs[0]), scale(xs[-1])

    def across(x: float) -> float:
        return _LEFT + (scale(x) - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">',
        f"<title>{escape(plot.title)}</title><style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff"/>',
        _text(_LEFT, 28, plot.title, "start", "t"),
        _text(_WIDTH / 2, _HEIGHT - 14, plot.x),
        f'<text transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.y)}</text>",
    ]
    for number in range(round(top / step) + 1):
        y = down(number * step)
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{number * step:g}", "end"))
    parts += [_text(across(x), _HEIGHT - _BOTTOM + 20, f"{x:g}") for x in xs]
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


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not less."""
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least)
