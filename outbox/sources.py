"""Where settings come from: flags, the environment (`OUTBOX_…`, or a file that `OUTBOX_…_FILE` names), `outbox.toml`.

The first of these counts, else the default. The only place that reads settings from files. Every mistake is found at
once; none of them quotes a value.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from outbox.config import Settings
from outbox.errors import Denied, Misconfigured

FILE = Path("outbox.toml")
PREFIX = "OUTBOX_"
BY_FILE = "_FILE"
# Kubernetes and Docker describe a service called "outbox" to its neighbours; and the tests have variables of their own.
STRANGERS = re.compile(r"OUTBOX_(TESTS_\w+|(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as anybody may read it; `value` is null where none is given, `source` where it comes from."""

    name: str
    variable: str
    value: str | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Settings, and where each that is not the default comes from."""

    settings: Settings
    origins: dict[str, str]

    def listed(self) -> list[Setting]:
        """All of them, in their order."""
        return [
            Setting(
                name=name,
                variable=variable(name),
                value=self.settings.shown(name),
                source=self.origins.get(name, "default"),
            )
            for name in Settings.model_fields
        ]


class WrongSettings(Misconfigured):
    """What is wrong with the settings, one by one."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = mistakes


def load(environment: Mapping[str, str] = os.environ, file: Path = FILE, **flags: Any) -> Loaded:
    """Settings from flags (None: not given) and their sources. Raises `WrongSettings` with every mistake."""
    found = find(Settings.model_fields, environment, file)
    for name, value in flags.items():
        if value is not None:
            found.add(name, value, "flag")
    mistakes = found.mistakes
    try:
        settings = Settings(**found.values)
    except ValidationError as error:
        mistakes.extend(_invalid(error, found))
    if mistakes:
        raise WrongSettings(mistakes)
    settings.files.update(found.files)
    return Loaded(settings=settings, origins=found.origins)


def current(settings: Settings, prefix: str) -> Settings:
    """The settings, with what the files of those whose names begin so hold now: passwords are renewed.

    For each new connection. Raises `Denied` where a file cannot be used, which its next reader may find mended.
    """
    found = Found()
    for name, path in settings.files.items():
        if name.startswith(prefix):
            _take(name, None, str(path), found)
    # Only what goes together with it: that another file is gone is told by who reads that one.
    others = {name: value for name, value in settings.model_dump().items() if name.startswith(prefix)}
    renewed = settings
    try:
        if found.values:
            renewed = Settings(**{**others, **found.values})
    except ValidationError as error:
        found.mistakes.extend(_invalid(error, found))
    if found.mistakes:
        raise Denied("; ".join(found.mistakes), remedy="put it right: it is read again for the next connection")
    return settings.model_copy(update={name: getattr(renewed, name) for name in found.values})


def _invalid(error: ValidationError, found: Found) -> Iterator[str]:
    for each in error.errors(include_url=False, include_input=False):
        name = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        yield f"setting {name} ({found.origins.get(name, variable(name))}): {message}"


@dataclass(frozen=True, slots=True)
class Found:
    """What the sources gave: the values by the setting's name, where each is from, its own file, and every mistake."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, origin: str) -> None:
        """Take a value, over what a weaker source gave."""
        self.values[name], self.origins[name] = value, origin
        self.files.pop(name, None)


def is_text(given: str) -> bool:
    """False for what was no UTF-8 when the interpreter took it from the environment or the command line."""
    return given.isascii() or not any("\ud800" <= each <= "\udfff" for each in given)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def find(names: Collection[str], environment: Mapping[str, str], file: Path) -> Found:
    """Read both sources. An empty variable counts as not given."""
    found = Found()
    for name, value in _table(file, found.mistakes).items():
        if name in names:
            found.add(name, value, str(file))
        else:
            found.mistakes.append(f"{file} has no setting {name!r}{_meant(name, names)}")
    given = {key.upper(): value for key, value in environment.items() if value and key.upper().startswith(PREFIX)}
    for name in names:
        _take(name, given.pop(variable(name), None), given.pop(variable(name) + BY_FILE, None), found)
    found.mistakes.extend(_strangers(given, names))
    return found


def _take(name: str, value: str | None, path: str | None, found: Found) -> None:
    both = f"{variable(name)} and {variable(name)}{BY_FILE}"
    if not is_text(value or path or ""):
        found.mistakes.append(f"{variable(name)} is not UTF-8 text")
    elif value is not None and path is not None:
        found.mistakes.append(f"{both} are both given: give one of them")
    elif value is not None:
        found.add(name, value, variable(name))
    elif path is not None:
        try:
            content = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            found.mistakes.append(f"{variable(name)}{BY_FILE}: {path} cannot be read: {_reason(error)}")
            return
        if content:
            found.add(name, content, f"{variable(name)}{BY_FILE}: {path}")
            found.files[name] = Path(path)
        else:
            found.mistakes.append(f"{variable(name)}{BY_FILE}: {path} is empty")


def _table(file: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        mistakes.append(f"{file} cannot be read: {_reason(error)}")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        mistakes.append(f"{file} is not valid TOML: {error}")
    return {}


def _strangers(given: Collection[str], names: Collection[str]) -> Iterator[str]:
    known = [name.upper() + end for name in names for end in ("", BY_FILE)]
    for key in sorted(given):
        if not STRANGERS.fullmatch(key):
            yield f"{key} is no setting{_meant(key.removeprefix(PREFIX), known, PREFIX)}"


def _meant(name: str, known: Collection[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {prefix}{close[0]}?" if close else ""


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is not UTF-8 text"
