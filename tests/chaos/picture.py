"""Draws the timeline of a run as SVG: faults in lanes, and below them the effects and the waiting callers.

The SVG has styles for light and dark, and no script, font or other external resource.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.chaos.report import Run

WIDTH, LEFT, RIGHT = 960, 166, 22
LANE, GAP, CHART = 15, 12, 84  # heights
BUCKETS = 180  # bars across: about five pixels each

# One colour for kills, one for freezes, one for cuts. Each fault also has a lane, so the colours are not needed.
STYLE = """
.chaos { font: 12px system-ui, sans-serif; fill: #24292f }
.chaos .paper { fill: #ffffff } .chaos .lane { fill: #f0f2f4 } .chaos .grid { stroke: #d8dce0 }
.chaos .kill { fill: #c2255c } .chaos .freeze { fill: #3b6fd4 } .chaos .cut { fill: #b35c00 }
.chaos .effect { fill: #2b8a57 } .chaos .wait { fill: #8a63d2 } .chaos .soft { fill: #57606a }
@media (prefers-color-scheme: dark) {
.chaos { fill: #e6edf3 } .chaos .paper { fill: #14181d } .chaos .lane { fill: #20262d } .chaos .grid { stroke: #343c45 }
.chaos .kill { fill: #ff6b9d } .chaos .freeze { fill: #79a6ff } .chaos .cut { fill: #f0a04b }
.chaos .effect { fill: #56c98a } .chaos .wait { fill: #b69cf2 } .chaos .soft { fill: #9aa5b1 }
}
""".strip()


def picture(run: Run) -> str:
    """Return the text of the SVG."""
    times = [float(effect["at"]) for effect in run.effects] + [float(a["ended"]) for a in run.answers]
    span = max([run.plan.seconds, *(at - run.start for at in times)]) + 0.5
    drawing = _Drawing(span)
    verdict = run.verdict
    bad = len(verdict.violations)
    drawing.title(
        f"{verdict.intents:,} intents, {verdict.calls:,} callers, {verdict.effects:,} effects, "
        f"{sum('failed' not in fault for fault in run.faults)} faults: "
        f"{verdict.of('double')} doubles, {verdict.of('lost')} lost, "
        f"{verdict.of('wrong answer') + verdict.of('no answer')} callers without the right answer",
        f"seed {run.plan.seed}" + (f", {bad} violations" if bad else ""),
    )
    for kind in run.plan.kinds:
        for broker in ("",) if kind.endswith(("store", "host")) else run.plan.brokers:
            faults = [
                (fault["began"] - run.start, fault["ended"] - run.start)
                for fault in run.faults
                if fault["intent"] == kind and fault["broker"] == broker and "failed" not in fault
            ]
            drawing.lane(f"{kind} {broker}".strip(), kind.partition(" ")[0], faults)
    drawing.bars(
        "effects a second", "effect", [at - run.start for at in (float(e["at"]) for e in run.effects)]
    )
    drawing.level(
        "callers waiting", "wait", [(a["began"] - run.start, a["ended"] - run.start) for a in run.answers]
    )
    drawing.axis()
    return drawing.text()


class _Drawing:
    def __init__(self, span: float) -> None:
        self._span = span
        self._y = 0.0
        self._parts: list[str] = []

    def _x(self, seconds: float) -> float:
        return LEFT + min(max(seconds, 0.0), self._span) / self._span * (WIDTH - LEFT - RIGHT)

    def _words(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_class(kind)}>{html.escape(text)}</text>'
        )

    def _box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{_class(kind)}/>'
        )

    def title(self, text: str, small: str) -> None:
        self._words(12, 22, text)
        self._words(12, 40, small, "soft")
        self._y = 54.0

    def lane(self, name: str, kind: str, faults: Sequence[tuple[float, float]]) -> None:
        """Draw one row of faults. A fault without duration gets the smallest visible width."""
        self._words(LEFT - 8, self._y + LANE - 4, name, anchor="end")
        self._box(LEFT, self._y, WIDTH - LEFT - RIGHT, LANE - 2, "lane")
        for began, ended in faults:
            left = self._x(began)
            self._box(left, self._y, max(2.0, self._x(ended) - left), LANE - 2, kind)
        self._y += LANE

    def bars(self, name: str, kind: str, times: Sequence[float]) -> None:
        """Draw how many events there are per second."""
        counts = [0] * BUCKETS
        for at in times:
            counts[min(BUCKETS - 1, max(0, int(at / self._span * BUCKETS)))] += 1
        self._chart(name, kind, [count / (self._span / BUCKETS) for count in counts])

    def level(self, name: str, kind: str, spans: Sequence[tuple[float, float]]) -> None:
        """Draw how many spans are open in the middle of each bucket."""
        middles = [(n + 0.5) * self._span / BUCKETS for n in range(BUCKETS)]
        self._chart(name, kind, [float(sum(a <= at <= b for a, b in spans)) for at in middles])

    def _chart(self, name: str, kind: str, values: Sequence[float]) -> None:
        self._y += GAP
        top = max(*values, 1.0)
        self._words(LEFT - 8, self._y + 11, name, anchor="end")
        self._words(LEFT - 8, self._y + 27, f"up to {top:.0f}", "soft", anchor="end")
        self._box(LEFT, self._y, WIDTH - LEFT - RIGHT, CHART, "lane")
        width = (WIDTH - LEFT - RIGHT) / BUCKETS
        for n, value in enumerate(values):
            if value > 0:
                height = value / top * (CHART - 2)
                self._box(LEFT + n * width, self._y + CHART - height, width * 0.82, height, kind)
        self._y += CHART

    def axis(self) -> None:
        step = next((s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800) if self._span / s <= 12), 3600)
        at = 0
        while at <= self._span:
            x = self._x(at)
            self._parts.append(f'<path class="grid" d="M{x:.1f} {self._y:.1f}v5"/>')
            label = f"{at} s" if self._span < 120 else f"{at // 60}:{at % 60:02}"
            self._words(x, self._y + 18, label, "soft", anchor="middle" if at else "start")
            at += step
        self._y += 28

    def text(self) -> str:
        height = f"{self._y:.0f}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chaos" viewBox="0 0 {WIDTH} {height}" role="img">'
            f"<style>{STYLE}</style>"
            f'<rect class="paper" width="{WIDTH}" height="{height}"/>{"".join(self._parts)}</svg>\n'
        )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
