"""Writes what the documents say by the code: commands, settings, metrics, the wings of the house, the index of pages.

    python docs/site/reference.py            # write docs/reference/*.md, docs/how-it-works.md, docs/llms.txt
    python docs/site/reference.py --check    # change nothing; exit with 1 if one of them would change

In the references only what stands between the markers is written; the text around it is for people to edit.
Reads the declarations that typer and pydantic read, not what one version of them makes of those.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import typer
import yaml
from pages import CONFIG, DOCS, ROOT, sections, source_of
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from typer.models import ArgumentInfo, OptionInfo

from outbox.cli.app import app
from outbox.config import Settings
from outbox.monitor.metrics import Metrics

BEGIN, END = "<!-- generated: python docs/site/reference.py -->", "<!-- end -->"
LARGEST_SHOWN = 2**31  # a default above it means that there is no limit


def commands(of: typer.Typer, above: str = "outbox") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command by its full name, in the order of `--help`."""
    for command in of.registered_commands:
        if command.callback is not None and not command.hidden:
            yield f"{above} {command.name or command.callback.__name__}", command.callback
    for group in of.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance, f"{above} {group.name}")


def parameters(callback: Callable[..., Any]) -> Iterator[tuple[str, Any, Any, OptionInfo | ArgumentInfo]]:
    """Name, type, default and declaration of each argument and option."""
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, *notes = typing.get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        (declared,) = [note for note in notes if isinstance(note, OptionInfo | ArgumentInfo)] or [typer.Option()]
        if not declared.hidden:
            yield name, kind, parameter.default, declared


def flag(name: str, declared: OptionInfo | ArgumentInfo) -> str:
    """The option as it is typed; an argument by its name, in capitals."""
    if isinstance(declared, ArgumentInfo):
        return name.upper()
    # Behind Annotated the first name stands where the default stood once.
    given = [each for each in (declared.default, *(declared.param_decls or ())) if isinstance(each, str)]
    return ", ".join(given or ["--" + name.replace("_", "-")])


def flags() -> set[str]:
    """The options of all commands."""
    found = {flag(name, declared) for _, command in commands(app) for name, _, _, declared in parameters(command)}
    return {each for together in found for each in together.split(", ")}


def _bare(kind: Any) -> tuple[Any, bool]:
    """The type without None and list, and whether it was a list."""
    inner = [each for each in typing.get_args(kind) if each is not NoneType]
    if typing.get_origin(kind) is list:
        return inner[0], True
    return _bare(inner[0]) if inner else (kind, False)


def _choices(kind: Any) -> str:
    bare, _ = _bare(kind)
    is_choice = isinstance(bare, type) and issubclass(bare, Enum)
    return " One of " + ", ".join(f"`{each.value}`" for each in bare) + "." if is_choice else ""


def _default(value: Any) -> str:
    if value is None or value is False or value == "" or value is inspect.Parameter.empty:
        return ""
    if isinstance(value, int) and value > LARGEST_SHOWN:
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _cell(text: str) -> str:
    """Text of the code as a table's cell, where nothing is markup."""
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


def _option_row(name: str, kind: Any, default: Any, declared: OptionInfo | ArgumentInfo) -> str:
    bare, several = _bare(kind)
    value = "" if bare is bool or isinstance(declared, ArgumentInfo) else f" {declared.metavar or _placeholder(bare)}"
    repeated = " Can be repeated." if several and isinstance(declared, OptionInfo) else ""
    meaning = _cell(declared.help or "") + _choices(kind) + repeated
    return f"| `{flag(name, declared)}{value}` | {_default(default)} | {meaning} |"


def _placeholder(kind: Any) -> str:
    names = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "FILE"}
    return names.get(kind, "CHOICE" if isinstance(kind, type) and issubclass(kind, Enum) else "TIME")


def command_page() -> str:
    """A section for each command: what it does, an example, its options."""
    parts = []
    for title, callback in commands(app):
        text, _, example = inspect.cleandoc(callback.__doc__ or "").partition("Example: ")
        parts.append(f"## {title}\n\n{text.strip()}\n")
        if example:
            parts.append(f"```sh\n{' '.join(example.split())}\n```\n")
        rows = [_option_row(*each) for each in parameters(callback)]
        if rows:
            parts.append("| option | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def settings_page() -> str:
    """A table of all settings, in the order of the code."""
    there, rows = flags(), []
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        names = f"`OUTBOX_{name.upper()}`" + (f"<br>`{option}`" if option in there else "")
        meaning = _cell(field.description or "") + _choices(field.annotation)
        default = "`false`" if field.default is False else _default(field.default)
        rows.append(f"| {names} | {default} | {meaning} |")
    return "| variable and flag | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def metrics_page() -> str:
    """A table of all metrics, in the order of the code; the label `schema` is on each."""
    registry = CollectorRegistry()
    Metrics("outbox", "", registry)
    rows = []
    for collector in registry._collector_to_names:  # noqa: SLF001 - what is by stream has no sample to be read from yet
        assert isinstance(collector, MetricWrapperBase)  # noqa: S101 - the registry is ours
        (family,) = collector.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in collector._labelnames if label != "schema")  # noqa: SLF001 - as above
        rows.append(f"| `{name}` | {family.type} | {labels} | {_cell(family.documentation)} |")
    return "| metric | type | labels | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def house() -> str:
    """A table of the package's folders and files, with what each says of itself."""
    package = ROOT / "outbox"
    wings = sorted(path.parent for path in package.glob("*/__init__.py"))
    rows = []
    for wing in wings:
        rooms = ", ".join(f"`{room.stem}`" for room in sorted(wing.glob("*.py")) if room.stem != "__init__")
        rows.append(f"| `{wing.name}/` | {_cell(_docstring(wing / '__init__.py'))} | {rooms} |")
    for file in sorted(package.glob("*.py")):
        first, _, _ = _docstring(file).partition("\n\n")
        rows.append(f"| `{file.name}` | {_cell(first)} | |")
    return "| place | what it knows | its rooms |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def index() -> str:
    """`llms.txt`: every page with its first sentence."""
    lines = ["# outbox", ""]
    for title, pages in sections(yaml.safe_load(CONFIG.read_text())["nav"]):
        lines += [f"## {title}", ""]
        lines += [f"- [{heading}]({page}): {about}" for page in pages for heading, about in [_summary(page)]]
        lines.append("")
    _, about = _summary("index.md")
    lines[1:1] = ["", f"> {about}"]
    return "\n".join(lines).rstrip() + "\n"


def _summary(page: str) -> tuple[str, str]:
    """A page's heading, and the first sentence below it."""
    text = (ROOT / source_of(page)).read_text()
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert heading, f"{page} has no heading"  # noqa: S101 - a mistake of who wrote the page
    body = text[heading.end() :].partition("## Decision\n")[2] or text[heading.end() :]
    body = re.sub(r"^(#|```|\||!|<!--).*$", "", body, flags=re.MULTILINE).strip()
    first = " ".join(body.split("\n\n")[0].split())
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first)
    return heading.group(1), re.split(r"(?<=[.:?!]) (?=[A-Z`*])", plain)[0].rstrip(":")


def filled(path: Path, made: str) -> str:
    """The file's text with what was made between its markers."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main() -> None:
    """Write the files, or say which would change."""
    reference = ROOT / DOCS / "reference"
    made = {
        path: filled(path, text())
        for path, text in (
            (reference / "cli.md", command_page),
            (reference / "settings.md", settings_page),
            (reference / "metrics.md", metrics_page),
            (ROOT / DOCS / "how-it-works.md", house),
        )
    }
    made[ROOT / DOCS / "llms.txt"] = index()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says: run python docs/site/reference.py")
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(made[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
