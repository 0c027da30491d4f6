"""One HTML file that needs no other: style, script and data inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from importlib import resources
from typing import Any

SCRIPTS = ("base.js", "graph.js", "panels.js", "tables.js", "views.js", "page.js")
"""In the order in which they are joined."""


def page(data: dict[str, Any], *, made: str = "", extra: str = "") -> bytes:
    """The file.

    Args:
        data: plain data that the script shows; it is compressed (gzip, base64), so that no text of it can be taken for HTML.
        made: when it was made; the only thing in the file that is not the same for the same model.
        extra: a finished HTML fragment for a tab of its own, or the empty string.

    Returns:
        UTF-8. Its policy lets in this very script (by its SHA-256) and no connection of any kind.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_file(name) for name in SCRIPTS) + "\n})();\n"
    packed = base64.b64encode(gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), 9, mtime=0)).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_hash(script)}'"
    return _TEXT.format(
        policy=policy, title=html.escape(str(data["title"])), style=_file("page.css"), script=script, data=packed, made=html.escape(made), extra=extra
    ).encode()


def _file(name: str) -> str:
    return (resources.files("fxq.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_TEXT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{title} - fxq report</title>
<style>
{style}
</style>
</head>
<body>
<noscript><p class="pad">This report is drawn by its own script; allow scripts for this file.</p></noscript>
<div id="app" data-made="{made}"><p class="pad">Reading the report ...</p></div>
<template id="extra">{extra}</template>
<script type="text/plain" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
