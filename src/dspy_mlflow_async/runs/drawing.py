"""Trees as pictures: SVG, drawn without a library, and Mermaid, in microseconds, so that each run can have one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_INDENT, _GAP, _LINE, _PADDING, _MARGIN = 28, 10, 18, 8, 12  # pixels
_CHARACTER = 7.3  # pixels of an average one
_MAX_CHARACTERS = 120  # of a line
# XML has no words for these, whatever they are written as.
_ODD = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}"
    ".title{font-weight:600}.note,.below{fill:#57606a}path{fill:none;stroke:#afb8c1}rect{stroke:#afb8c1}"
    ".marked{stroke:#1a7f37;stroke-width:2}"
)
_MERMAID = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"}


@dataclass(frozen=True, slots=True)
class Row:
    """One box of a tree, whose parent is the last row before it that is one less deep.

    Attributes:
        depth: 0 for a root.
        title: Its name.
        note: What stands beside it.
        below: What stands in a second line.
        fill: Its colour, as CSS has it.
        is_marked: Whether it stands out.
    """

    depth: int
    title: str
    note: str = ""
    below: str = ""
    fill: str = "#f6f8fa"
    is_marked: bool = False


def svg(rows: Sequence[Row], label: str) -> str:
    """Return the tree as an SVG document.

    Args:
        rows: Parents first.
        label: What it shows, for those who cannot see it.
    """
    top, width = float(_MARGIN), 0.0
    middles: list[float] = []  # of the last box of each depth
    parts: list[str] = []
    for row in rows:
        title, note, below = _shown(row.title), _shown(row.note), _shown(row.below)
        height = 2 * _PADDING + _LINE * (2 if below else 1)
        left = _MARGIN + _INDENT * row.depth
        wide = 2 * _PADDING + _CHARACTER * max(len(title) + len(note) + 2, len(below))
        middle = top + height / 2
        del middles[row.depth :]
        if middles:
            x = left - _INDENT / 2
            parts.append(f'<path d="M{x} {middles[-1]}V{middle}H{left}"/>')
        middles.append(top + height)
        marked = ' class="marked"' if row.is_marked else ""
        parts.append(
            f'<rect{marked} x="{left}" y="{top:g}" width="{wide:.0f}" height="{height}" rx="6" '
            f'fill="{escape(row.fill)}"/>'
            f'<text x="{left + _PADDING}" y="{top + _PADDING + 13:g}"><tspan class="title">{escape(title)}</tspan>'
            f'<tspan class="note" dx="8">{escape(note)}</tspan></text>'
        )
        if below:
            y = top + _PADDING + _LINE + 13
            parts.append(f'<text class="below" x="{left + _PADDING}" y="{y:g}">{escape(below)}</text>')
        top += height + _GAP
        width = max(width, left + wide + _MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(_shown(label))}" '
        f'width="{width:.0f}" height="{top:.0f}" viewBox="0 0 {width:.0f} {top:.0f}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def mermaid(rows: Sequence[Row]) -> str:
    """Return the tree as the text of a Mermaid flowchart."""
    lines, above = ["flowchart TD"], list[int]()
    for number, row in enumerate(rows):
        head = f"{row.title}: {row.note}" if row.note else row.title
        text = "<br>".join(_quoted(each) for each in (head, row.below) if each)
        del above[row.depth :]
        arrow = f"n{above[-1]} --> " if above else ""
        lines.append(f'  {arrow}n{number}["{text}"]')
        above.append(number)
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "".join(_MERMAID.get(each, each) for each in _shown(text))


def _shown(text: str) -> str:
    text = _ODD.sub("\ufffd", " ".join(text[: 4 * _MAX_CHARACTERS].split()))
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"
