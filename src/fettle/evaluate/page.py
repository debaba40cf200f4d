"""The frame of every HTML page that evaluation writes: style, header, tables. Everything given is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# No script, no font, no image from elsewhere: the page must open from a mail attachment and from an air-gapped disk.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2230; --muted: #5d6778; --line: #e1e5eb;
  --best: #0f8a5f; --front: #2f6fde; --other: #a9b2c0; --baseline: #c2571a; --warn: #a15c00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12151b; --card: #1a1f28; --ink: #e8ecf3; --muted: #9aa5b6; --line: #2c3340;
  --best: #3ecf97; --front: #78a7ff; --other: #5b6678; --baseline: #f0945c; --warn: #f0b45c; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 56px; }
.kicker { color: var(--muted); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; margin: 0; }
h1 { font-size: 27px; line-height: 1.25; margin: 4px 0 10px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 4px; font-weight: 650; }
p { margin: 0 0 6px; } .note { color: var(--muted); font-size: 13.5px; }
.badge { display: inline-block; border-radius: 999px; padding: 2px 12px; font-size: 13px; font-weight: 600;
  border: 1px solid currentColor; margin-bottom: 14px; }
.good { color: var(--best); } .warn { color: var(--warn); } .bad { color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin-top: 16px; }
.tiles, .pair { display: grid; gap: 16px; margin-top: 16px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tiles section, .pair section { margin-top: 0; }
.tile b { display: block; font-size: 30px; line-height: 1.2; font-weight: 680; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th, td { padding: 7px 10px 7px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; padding-left: 8px; }
td.best { font-weight: 650; color: var(--best); }
.small { color: var(--muted); font-size: 12.5px; font-weight: 400; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; color: var(--muted); font-size: 13px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
ul { margin: 6px 0 0; padding-left: 20px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 6px 0 0; font-size: 13.5px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell: text, a smaller second line, and whether it is a number (right-aligned) or stands out."""

    text: str
    below: str = ""
    number: bool = False
    style: str = ""


def render_page(title: str, body: str) -> str:
    """A complete document. title: plain text; body: HTML made by the functions here."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def render_header(kicker: str, sentences: Sequence[str], *, badge: str = "", style: str = "") -> str:
    """The name, the first sentence as a title, a badge, and the other sentences."""
    first, *others = [*sentences] or [""]
    mark = f'<span class="badge {style}">{escape(badge)}</span>' if badge else ""
    rest = "".join(f"<p>{escape(sentence)}</p>" for sentence in others)
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(first)}</h1>{mark}{rest}</header>'


def render_tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Large figures side by side, each (heading, figure, what it was before and after)."""
    drawn = (
        f'<section class="tile"><h2>{escape(heading)}</h2><b>{escape(figure)}</b>'
        f'<span class="note">{escape(detail)}</span></section>'
        for heading, figure, detail in tiles
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def render_section(heading: str, content: str, *, note: str = "") -> str:
    """A card. content: HTML."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{below}{content}</section>"


def render_grid(head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls sideways on a narrow screen rather than breaking the page."""
    heading = "".join(_cell("th", cell) for cell in head)
    lines = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heading}</tr></thead><tbody>{lines}</tbody></table></div>'


def render_list(items: Sequence[str]) -> str:
    """A bulleted list of plain sentences."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def render_facts(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns; digests and versions read best in a fixed width."""
    return (
        f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>' for name, value in facts)}</dl>"
    )


def _cell(tag: str, cell: Cell) -> str:
    names = " ".join(name for name in ("number" if cell.number else "", cell.style) if name)
    attribute = f' class="{names}"' if names else ""
    below = f'<br><span class="small">{escape(cell.below)}</span>' if cell.below else ""
    return f"<{tag}{attribute}>{escape(cell.text)}{below}</{tag}>"
