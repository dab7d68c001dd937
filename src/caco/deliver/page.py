"""One HTML page that needs nothing but itself: no network, no scripts, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from caco.deliver.charts import Series, short_number
from caco.deliver.pictures import Row, data_uri

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d1f23; --quiet: #676c76; --line: #e6e3dc;
  --c0: #2f5fd0; --c1: #c2571a; --good: #1f8a5b; --warning: #b7791f; --bad: #c0392b; --unknown: #676c76; }
@media (prefers-color-scheme: dark) { :root { --paper: #131417; --card: #1b1d21; --ink: #e8e6e1; --quiet: #9a9fa9;
  --line: #2d3036; --c0: #7ea4ff; --c1: #f0995c; --good: #4cc38a; --warning: #e2b04a; --bad: #ff7b6b;
  --unknown: #9a9fa9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 16px/1.55 Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 64px 28px 96px; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, "Liberation Serif", serif;
  font-weight: 600; letter-spacing: -0.012em; line-height: 1.12; }
h1 { font-size: 52px; margin: 6px 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 29px; margin: 0 0 8px; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 2px; }
section { margin-top: 76px; }
p { margin: 0 0 14px; max-width: 70ch; }
.overline { font-size: 12px; letter-spacing: .13em; text-transform: uppercase; color: var(--quiet); margin: 0; }
.lead, .quiet { color: var(--quiet); }
.lead { margin-bottom: 26px; }
.verdict { margin: 30px 0 0; padding: 2px 0 2px 18px; border-left: 4px solid var(--mood); }
.verdict strong { color: var(--mood); font-weight: 650; }
.verdict p { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 26px 20px; margin: 40px 0 0;
  padding: 26px 0 24px; border: solid var(--line); border-width: 1px 0; }
.tiles dt { font-size: 12.5px; color: var(--quiet); }
.tiles dd { margin: 0; font-size: 30px; letter-spacing: -0.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: 12.5px; letter-spacing: 0; color: var(--quiet); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 22px; }
figure { margin: 0; }
.charts figure, .beside figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 15px 16px 10px; }
figcaption { font-size: 14px; font-weight: 600; display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
figcaption span { font-weight: 400; font-size: 12.5px; color: var(--quiet); font-variant-numeric: tabular-nums; }
figcaption span::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 5px; background: var(--dot); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.tick.y, .axis-name, .level-name, .reading text { text-anchor: end; }
.tick.x { text-anchor: middle; }
.grid { stroke: var(--line); } .base, .notch { stroke: var(--quiet); opacity: .55; }
.level { stroke: var(--quiet); stroke-dasharray: 3 4; opacity: .8; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); }
.end.c0, .dot.c0 { fill: var(--c0); stroke: var(--card); } .end.c1, .dot.c1 { fill: var(--c1); stroke: var(--card); }
.reading rect { fill: transparent; } .reading path { stroke: var(--quiet); opacity: 0; }
.reading circle, .reading text { opacity: 0; pointer-events: none; }
.reading:hover path { opacity: .5; } .reading:hover circle, .reading:hover text { opacity: 1; }
.reading text { fill: var(--ink); }
.map .ground { fill: var(--card); stroke: var(--line); } .map circle { opacity: .85; }
.map .group { transition: opacity .12s; }
.map:has(.group:hover) .group { opacity: .08; } .map .group:hover { opacity: 1; } .map .plain { fill: var(--c0); }
.map text { fill: var(--ink); font-size: 12px; }
.map-holder { max-width: 900px; }
img { display: block; border-radius: 5px; background: var(--line); }
.rows { display: grid; gap: 20px 34px; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); }
.row h3 small { font-weight: 400; color: var(--quiet); font-size: 12.5px; margin-left: 6px;
  font-variant-numeric: tabular-nums; }
.strip { display: grid; grid-template-columns: var(--first) repeat(var(--count), minmax(0, 1fr)); gap: 5px; margin-top: 6px; }
.strip img { width: 100%; aspect-ratio: 1; object-fit: cover; }
.strip .tiny { image-rendering: pixelated; }
.strip div { border-bottom: 3px solid transparent; padding-bottom: 3px; }
.strip .yes { border-color: var(--good); } .strip .no { border-color: var(--line); }
.strip i { border-left: 1px solid var(--line); margin: 2px 0 6px 4px; }
.beside { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 34px; margin-bottom: 30px; }
.beside .lead { margin: 0; }
.examples { display: grid; gap: 22px 34px; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); }
.example { display: flex; gap: 7px; align-items: center; flex-wrap: wrap; }
.example .original { position: relative; height: 132px; margin-right: 8px; }
.example .original img { height: 100%; width: auto; max-width: 220px; }
.example .original svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.example .original rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.example .view { height: 120px; border-bottom: 3px solid var(--dot); } .example .view.many { height: 56px; }
.options { columns: 2; column-gap: 40px; font-size: 13.5px; }
.options > div { break-inside: avoid; margin-bottom: 22px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td { padding: 3.5px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { padding-right: 16px; color: var(--quiet); width: 190px; }
.options td:first-child { width: 54%; }
td:last-child { font-variant-numeric: tabular-nums; }
tr.changed td { color: var(--c0); font-weight: 600; } tr.changed small { font-weight: 400; color: var(--quiet); }
.results { margin: 6px 0 26px; max-width: 760px; } .results td:first-child { width: auto; }
.results th { text-align: right; font-weight: 400; font-size: 12.5px; color: var(--quiet); }
.results td:not(:first-child) { text-align: right; white-space: nowrap; width: 120px; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 13px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; margin: 0 0 22px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
footer { margin-top: 72px; padding-top: 18px; border-top: 1px solid var(--line); font-size: 13px; color: var(--quiet); }
@media (max-width: 720px) { h1 { font-size: 36px; } .options { columns: 1; }
  .charts, .rows, .examples, .beside { grid-template-columns: minmax(0, 1fr); } main { padding: 32px 16px 64px; } }
@media print { section { break-inside: avoid-page; margin-top: 40px; } main { padding: 0; } }
"""


def whole_page(title: str, body: Sequence[str]) -> str:
    """Return the HTML document. body: HTML; title: plain text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, lead: str, *body: str, beside: str = "") -> str:
    """Return one section. title and lead are plain text; body, and what stands beside the lead, are HTML."""
    opening = f'<p class="lead">{escape(lead)}</p>'
    if beside:
        opening = f'<div class="beside">{opening}{beside}</div>'
    return (
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{opening}\n'
        + "\n".join(part for part in body if part)
        + "\n</section>"
    )


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Return (what, value, remark) as large numbers side by side."""
    cells = []
    for what, value, remark in facts:
        small = f"<small>{escape(remark)}</small>" if remark else ""
        cells.append(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}{small}</dd></div>")
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def chart_figure(title: str, chart: str, series: Sequence[Series], unit: str = "") -> str:
    """Return a chart under its title and, for each curve, its name and last value; "" for an empty chart."""
    if not chart:
        return ""
    names = [
        f'<span style="--dot:var(--c{number})">{escape(curve.name)} {short_number(curve.y[-1])}{escape(unit)}</span>'
        for number, curve in enumerate(series)
        if len(curve.y)
    ]
    return f"<figure><figcaption>{escape(title)}{''.join(names)}</figcaption>{chart}</figure>"


def picture_rows(rows: Sequence[Row], titles: Sequence[Sequence[str]], first_asks: bool = False) -> str:
    """Return rows of square pictures; titles: shown when pointing at each. first_asks: set the first one apart."""
    count = max((len(row.pictures) for row in rows), default=1)
    columns = f"--first:minmax(0, 1fr) 10px;--count:{max(count - 1, 1)}" if first_asks else f"--first:;--count:{count}"
    parts = []
    for row, names in zip(rows, titles, strict=True):
        cells = []
        for place, (pixels, agrees, name) in enumerate(zip(row.pictures, row.agrees, names, strict=True)):
            mark = {True: ' class="yes"', False: ' class="no"', None: ""}[agrees]
            tiny = ' class="tiny"' if min(pixels.shape[:2]) <= 48 else ""
            label = escape(name)
            cells.append(f'<div{mark}><img{tiny} src="{data_uri(pixels)}" alt="{label}" title="{label}"></div>')
            cells += ["<i></i>"] if first_asks and place == 0 else []
        parts.append(
            f'<div class="row"><h3>{escape(row.heading)}<small>{escape(row.detail)}</small></h3>'
            f'<div class="strip" style="{columns}">{"".join(cells)}</div></div>'
        )
    return f'<div class="rows">{"".join(parts)}</div>'


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return (name, value, remark) as a table; a row with a remark stands out."""
    cells = []
    for name, value, remark in rows:
        marked, small = (' class="changed"', f" <small>{escape(remark)}</small>") if remark else ("", "")
        cells.append(f"<tr{marked}><td>{escape(name)}</td><td>{escape(value)}{small}</td></tr>")
    return f"<table>{''.join(cells)}</table>"


def result_table(head: Sequence[str], rows: Sequence[Sequence[str]], first_stands_out: bool) -> str:
    """Return names and their numbers as a table with a head."""
    parts = ["<tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr>"]
    for place, row in enumerate(rows):
        marked = ' class="changed"' if first_stands_out and place == 0 else ""
        parts.append(f"<tr{marked}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f'<table class="results">{"".join(parts)}</table>'


def preformatted(text: str) -> str:
    """Return plain text, line for line."""
    return f"<pre>{escape(text)}</pre>"
