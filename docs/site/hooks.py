"""What MkDocs is told besides its configuration: which pages come from outside `docs/`, and where links lead then.

Documents are written for the repository's host, where every relative link leads to a file. On the site the README is
the first page, and a link to a file that has no page there leads to the repository, if its address is set (`repo_url`).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pages import DOCS, ELSEWHERE, ROOT, expanded, source_of

LINK = re.compile(r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<path>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")
plain: dict[str, str] = {}  # the pages of this build as Markdown, with the site's links


def on_config(config: Any) -> Any:
    """Folders in the navigation become their pages."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Pages that are written elsewhere in the repository."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links as the site needs them, and names of tests that can be broken; fenced blocks stay as they are."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match["text"], match["path"], match["anchor"] or ""
        if not path or "://" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(here)), path))
        pages = {source: name for name, source in ELSEWHERE.items()}
        if target.startswith(f"{DOCS}/") or target in pages:
            there = pages.get(target, target.removeprefix(f"{DOCS}/"))
            return f"{text}({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"
        return f"{text}({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})" if config.repo_url else text[1:-1]

    parts = FENCED.split(markdown)
    plain[here] = "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)
    return NAMED_TEST.sub(_breakable, plain[here])


def _breakable(name: re.Match[str]) -> str:
    return "<code>" + re.sub(r"(/|::|_)", r"\1<wbr>", name[1]) + "</code>"


def on_post_build(config: Any) -> None:
    """Each page as plain Markdown, beside it: `llms.txt` leads there."""
    for page, text in plain.items():
        copy = Path(config.site_dir) / page
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
