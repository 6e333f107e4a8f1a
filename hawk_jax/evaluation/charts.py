"""Pictures of the report as inline SVG: they scale, follow the page's colours, and can be read aloud.  Numbers in, markup out."""
import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 420, 236                # user units of a curve
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
CELL, LABEL, SLANT = 26, 132, 48         # of the confusion matrix: side of a cell, room for names, and for the last slanted one


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    style: str                          # CSS class: "train" or "validation"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 x 10^n) from the last at or below `low` to the first at or above `high`."""
    step = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 10_000 else f"{value / 1000:.4g}k"


def _axes(xs: list[float], ys: list[float], place) -> list[Markup]:
    parts = []
    for y in ys:
        px, py = place(xs[0], y)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text class="tick" x="{}" y="{:.1f}" '
                            'text-anchor="end">{}</text>').format(LEFT, WIDTH - RIGHT, py, py, LEFT - 6, py + 4, _number(y)))
    for i, x in enumerate(xs):
        anchor = "end" if i == len(xs) - 1 else "middle"
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            place(x, ys[0])[0], HEIGHT - BOTTOM + 18, anchor, _number(x)))
    return parts


def curves(title: str, series: Sequence[Series]) -> Markup:
    """A line chart over steps; validation as points on a line.  Empty series and values that are not finite are left out."""
    series = [s._replace(points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    x_all, y_all = zip(*(p for s in series for p in s.points))
    xs, ys = ticks(0, max(x_all)), ticks(min(0.0, *y_all) if min(y_all) < 0.35 * max(y_all) else min(y_all), max(y_all))

    def place(x, y):
        return (LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM))
    parts = _axes(xs, ys, place)
    for s in series:
        dots = [place(*p) for p in s.points]
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(s.style, " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)))
        if s.style == "validation":
            parts += [Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(x, y) for x, y in dots]
    said = "; ".join(f"{s.name} from {_number(round(s.points[0][1], 4))} to {_number(round(s.points[-1][1], 4))}" for s in series)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}: {}"><title>{}: {}</title>{}</svg>').format(
        WIDTH, HEIGHT, title, said, title, said, Markup("").join(parts))


def _cell(x: int, y: int, true: str, named: str, count: int, share: float) -> Markup:
    kind = "none" if not count else "right" if true == named else "wrong"
    box = Markup('<rect class="cell {}" style="--share:{:.2f}" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, share, x, y, CELL - 1, CELL - 1)
    if not count:
        return box
    hint = f"{count} clips of {true} called {named}".replace("_", " ")
    return box + Markup('<text class="count{}" x="{}" y="{}" text-anchor="middle">{}<title>{}</title></text>').format(
        " strong" if share > 0.55 else "", x + CELL / 2, y + CELL / 2 + 4, count, hint)


def confusion(matrix: dict) -> Markup:
    """Rows: true classes; columns: named ones.  Shade: share of the row; the diagonal has its own colour."""
    classes, columns, parts = matrix["classes"], matrix["columns"], []
    width, height = LABEL + CELL * len(columns) + SLANT, LABEL + CELL * len(classes) + 8
    for j, name in enumerate(columns):
        parts.append(Markup('<text class="name" transform="translate({:.0f},{}) rotate(-60)">{}</text>').format(
            LABEL + CELL * (j + 0.5) + 4, LABEL - 6, name.replace("_", " ")))
    for i, (name, row) in enumerate(zip(classes, matrix["counts"])):
        y = LABEL + CELL * i
        parts.append(Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LABEL - 8, y + CELL / 2 + 4, name.replace("_", " ")))
        parts += [_cell(LABEL + CELL * j, y, name, named, count, count / max(sum(row), 1))
                  for j, (named, count) in enumerate(zip(columns, row))]
    right = sum(row[columns.index(name)] for name, row in zip(classes, matrix["counts"]))
    label = f"Confusion matrix of {len(classes)} classes: {right} of {sum(map(sum, matrix['counts']))} clips on the diagonal"
    return Markup('<svg viewBox="0 0 {} {}" style="min-width:{}px" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, label, Markup("").join(parts))
