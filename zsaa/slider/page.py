"""The slider as one HTML file: the widget's own script over a precomputed grid instead of a kernel."""

from __future__ import annotations

import html as escape
import json

# default-src 'none': the page asks for nothing, and could not if it wanted to.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}
</style>
</head>
<body class="zsaa-page">
<main id="zsaa"></main>
<noscript>This page draws with JavaScript, which is switched off.</noscript>
<script type="application/json" id="zsaa-data">{data}</script>
<script type="module">
{script}
mount(document.getElementById("zsaa"), pageSource(JSON.parse(document.getElementById("zsaa-data").textContent)));
</script>
</body>
</html>
"""


def html(data: dict, script: str, css: str) -> str:
    """The page. data: {"meta", "start", "texts"} as pageSource in slider.js reads them."""
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = escape.escape(data["meta"]["title"] or "The alpha slider")
    return _TEMPLATE.format(policy=_POLICY, title=title, css=css, data=packed, script=script)
