"""Tables for notebooks: HTML fragments from strings, everything escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

LEFT, RIGHT = "text-align:left", "text-align:right"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", numbers: Sequence[int] = ()) -> str:
    """A table as an HTML fragment without scripts.

    Args:
        head: titles of the columns.
        rows: cells; what is no string is written as ``str`` does.
        caption: a line above the table.
        numbers: columns that are aligned right.
    """
    styles = [f' style="{RIGHT if i in numbers else LEFT}"' for i in range(len(head))]

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}{style}>{html.escape(str(c))}</{tag}>" for style, c in zip(styles, cells, strict=True)) + "</tr>"

    above = f'<caption style="caption-side:top;{LEFT}">{html.escape(caption)}</caption>' if caption else ""
    return f"<table>{above}<thead>{line('th', head)}</thead><tbody>{''.join(line('td', r) for r in rows)}</tbody></table>"


def folded(summary: str, body: str) -> str:
    """A fragment that opens on a click.

    Args:
        summary: text, escaped here.
        body: HTML.
    """
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"
