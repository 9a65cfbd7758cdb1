"""HTML pages with everything inline, readable in light and dark."""

import base64
import html
import io
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from mtedit_fast.figures import DARK, LIGHT, Theme


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    body = "\n".join(filter(None, sections))
    return PAGE.replace("{title}", html.escape(title)).replace("{style}", STYLE).replace("{body}", body)


def section(title: str, content: str, note: str = "") -> str:
    """A titled card; `content` is HTML, `note` a line of plain text above it."""
    paragraph = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{content}</section>"


def picture(plot: Callable[[Theme], Figure], alt: str) -> str:
    """A plot drawn in both themes; the reader's browser picks one."""
    light, dark = (data_url(_png(plot(theme))) for theme in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


STYLE = """
:root { color-scheme: light dark }
:root { --ground: #f6f7f9; --card: #ffffff; --text: #1f2730; --faint: #5d6874; --line: #d9dee4 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161b; --card: #1b2128; --text: #dfe5ec; --faint: #97a3af; --line: #39424d }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 16px 0 4px } h2 { font-size: 18px; margin: 0 0 8px }
.lead { font-size: 17px; margin: 0 0 16px } p { color: var(--faint); margin: 0 0 12px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.card { padding: 12px 16px; color: var(--faint) } .card b { display: block; font-size: 20px; color: var(--text) }
section { padding: 18px; margin-top: 20px }
img { display: block; max-width: 100%; height: auto; margin: 0 auto 8px } .wide { overflow-x: auto }
.grid { border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left }
"""

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
