"""The guided notebook as a page of the site, with what its cells show: a hook of mkdocs.

`tour.ipynb` becomes the page `tour`; links to the notebook lead to the page, and the page offers the file.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NOTEBOOK, PAGE = "tour.ipynb", "tour.md"
SHOWN = (
    "saekit-output-{}-{}"  # where an output goes, once Markdown is done: what a cell shows is HTML of its own
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    cells = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text("utf-8"))["cells"]
    files.append(File.generated(config, PAGE, content=page(cells)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    if page.file.src_uri == PAGE:
        return markdown
    return markdown.replace(f"]({NOTEBOOK})", f"]({PAGE})")


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    if page.file.src_uri != PAGE:
        return content
    cells = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text("utf-8"))["cells"]
    for n, cell in enumerate(cells):
        for m, output in enumerate(cell.get("outputs", ())):
            content = content.replace(f"<p>{SHOWN.format(n, m)}</p>", shown(output))
    return content


def page(cells: list[dict[str, Any]]) -> str:
    """The notebook as Markdown, with a line in the place of each output."""
    parts = []
    for n, cell in enumerate(cells):
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        parts += [SHOWN.format(n, m) for m in range(len(cell.get("outputs", ())))]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[The notebook]({NOTEBOOK}){{download}} · run it with Jupyter, or read on.\n{rest}\n"


def shown(output: dict[str, Any]) -> str:
    """What a cell showed: its HTML, else its text."""
    data = output.get("data", {})
    if "text/html" in data:
        return f'<div class="shown">{"".join(data["text/html"])}</div>'
    text = "".join(data.get("text/plain", output.get("text", "")))
    plain = html.escape(re.sub(r"\x1b\[[0-9;]*m", "", text))  # without a terminal's colours
    return f'<div class="shown"><pre>{plain}</pre></div>'
