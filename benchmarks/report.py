"""Writes the benchmarks' rows as a table, a JSON file and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape


class Row(NamedTuple):
    """One comparison.

    Attributes:
        group: what is compared. The rows of a group have one base.
        name: the variant.
        ratio: the ratio to the base, the median of the rounds. None where it could not be measured.
        low, high: the ratios of the smallest and the largest round.
        target: the target ratio. None without a target.
        value: the measured amount, with its unit.
        note: a remark.
    """

    group: str
    name: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    value: str = ""
    note: str = ""


def compared(
    group: str,
    rounds: Mapping[str, Sequence[float]],
    base: str,
    unit: str,
    targets: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return a row for each variant.

    The ratio is taken per round, so that a slower machine slows both sides.

    Args:
        rounds: for each variant, the values measured in the first round, the second, …
        base: the variant that the others are compared with.
    """
    rows = []
    for name, measured in rounds.items():
        ratios = [one / other for one, other in zip(measured, rounds[base], strict=True)]
        rows.append(
            Row(
                group=group,
                name=name,
                ratio=round(statistics.median(ratios), 3),
                low=round(min(ratios), 3),
                high=round(max(ratios), 3),
                target=(targets or {}).get(name),
                value=f"{statistics.median(measured):,.0f} {unit}".strip(),
                note=(notes or {}).get(name, ""),
            )
        )
    return rows


def show(rows: Iterable[Row]) -> None:
    """Print the table."""
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            print(f"\n{group}\n{'':30} {'ratio':>6}  {'rounds':>13}  {'target':>6}  {'measured':>16}")
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.2f} … {row.high:.2f}"
        target = "" if row.target is None else f"{row.target:.2f}"
        over = row.target is not None and row.ratio is not None and row.ratio > row.target
        line = f"{row.name:30} {ratio:>6}  {spread:>13}  {target:>6}  {row.value:>16}"
        print(f"{line}  {'over its target. ' if over else ''}{row.note}".rstrip(), flush=True)


def write(rows: Sequence[Row], about: Mapping[str, Any], data: Path, picture: Path) -> None:
    """Write the rows as JSON and as a picture.

    Args:
        about: the machine and the versions.
    """
    for file in (data, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    kept = [{name: value for name, value in row._asdict().items() if value not in (None, "")} for row in rows]
    data.write_text(json.dumps({"about": about, "rows": kept}, indent=1, ensure_ascii=False) + "\n")
    picture.write_text(drawn([row for row in rows if row.ratio is not None and _worth_a_bar(row.group)]))


def _worth_a_bar(group: str) -> bool:
    """Return whether the picture shows a group. Wall clock and 99th percentiles are only in the table and the JSON."""
    return "p99" not in group and "wall clock" not in group


# --- the picture -------------------------------------------------------------------------

STYLE = (
    ".t{fill:#212529}.n{fill:#495057;font-size:12px}.b{fill:#adb5bd}.i{fill:#3b5bdb}.o{stroke:#212529}"
    ".g{stroke:#e8590c;stroke-dasharray:3 3}.r{stroke:#868e96}"
    "@media(prefers-color-scheme:dark){.t{fill:#f1f3f5}.n{fill:#ced4da}.b{fill:#5c636a}.i{fill:#91a7ff}"
    ".o{stroke:#f1f3f5}.g{stroke:#ffa94d}.r{stroke:#868e96}}"
)
"""b: bar, i: bar of celery_idem, o: the rounds from the smallest to the largest, g: target, r: the base."""

WIDTH, NAMES, BARS, LINE, HEAD = 850, 210, 520, 22, 34
"""Pixels: width of the picture, of the names on the left, of the longest bar; height of a row, of a heading."""

LONGEST = 3.2
"""The ratio of the longest bar. A bar of a larger ratio is cut; the number beside it is not."""


def drawn(rows: Sequence[Row]) -> str:
    """Draw the rows as bars in an SVG, in the reader's light or dark colours. The first of each group is the base."""
    scale = BARS / LONGEST
    parts: list[str] = []
    y, group = 0, None
    for row in rows:
        if row.group != group:
            group = row.group
            y += HEAD
            parts.append(f'<text class="t" x="8" y="{y - 6}">{escape(f"{group}, over {row.name}")}</text>')
            continue
        assert row.ratio is not None
        length = scale * min(row.ratio, LONGEST)
        ours = row.name.startswith("celery_idem")
        parts.append(
            f'<text class="n" x="{NAMES - 8}" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>'
            f'<rect class="{"i" if ours else "b"}" x="{NAMES}" y="{y + 4}" width="{length:.0f}" height="14" rx="2"/>'
        )
        if row.low is not None and row.high is not None and row.low < row.high:
            ends = [NAMES + scale * min(end, LONGEST) for end in (row.low, row.high)]
            parts.append(f'<path class="o" d="M{ends[0]:.0f} {y + 11}H{ends[1]:.0f}"/>')
        if row.target is not None:
            at = NAMES + scale * min(row.target, LONGEST)
            parts.append(f'<path class="g" d="M{at:.0f} {y + 1}V{y + 21}"/>')
        end = NAMES + scale * min(max(row.ratio, row.high or 0.0, row.target or 0.0), LONGEST)
        parts.append(f'<text class="n" x="{end + 8:.0f}" y="{y + 15}">{row.ratio:.2f} ×</text>')
        y += LINE
    base = NAMES + scale
    parts.append(f'<path class="r" d="M{base:.0f} {HEAD}V{y}"/>')
    y += 26
    parts.append(
        f'<text class="n" x="8" y="{y - 6}">Bars: median ratio; the grey line is 1.00. Thin lines: from the '
        "smallest to the largest round. Dashed: target.</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="system-ui, sans-serif" '
        'font-size="14" role="img" aria-label="What the guard costs, as ratios to the same work without it">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )
