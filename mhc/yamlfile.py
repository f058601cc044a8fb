"""Read a YAML file that people edit by hand: plain data, no duplicate keys, and every complaint on one line.

Whatever the file holds, reading ends soon and in data or in a complaint: a bound on its size, its depth and the digits of a number, no tags
beyond plain data (``!!python``, ``!!binary``), no merge keys (``<<``, with which a few lines make a billion), no FIFO or device that never
ends.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from mhc.files import read_text

#: Bytes of a file, levels of nesting and characters of a number: a hundred times what a profile of every model needs.
MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 4 << 20, 50, 64
#: Characters of a complaint beside the file's name, and of a value or a key in it.
MAX_COMPLAINT, MAX_SHOWN = 400, 100


class YAMLFileError(ValueError):
    """What is wrong with a file, on one line: the file, the field or the position, what was found and what was wanted."""

    def __init__(self, path: Path | str, message: str) -> None:
        self.path, self.message = path, message
        super().__init__(printable(f"{path}: {_cut(message, MAX_COMPLAINT)}"))


def printable(text: str) -> str:
    """``text`` on one line; what a terminal would obey or could not show is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


_REPR = reprlib.Repr()
_REPR.maxlevel = 2  # each level may be six times as long


def _shown(value: Any) -> str:
    return _cut(_REPR.repr(value), MAX_SHOWN)


_TAG = "tag:yaml.org,2002:"
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _scalar(kind: str) -> Callable[[yaml.SafeLoader, yaml.Node], Any]:
    """PyYAML's constructor of a kind of scalar, but one that complains by position where the text is none (``!!int x``, ``0x_``)."""
    construct = yaml.SafeLoader.yaml_constructors[_TAG + kind]

    def checked(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            what = f"a number of {len(node.value)} characters (at most {MAX_DIGITS})"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        try:
            return construct(loader, node)
        except (ValueError, LookupError, ArithmeticError):
            raise yaml.constructor.ConstructorError(None, None, f"{_shown(node.value)} is no {kind}", node.start_mark) from None

    return checked


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the base is chosen at run time
    """PyYAML's safe loader, less its surprises: a repeated key is an error, and an unquoted date or ``<<`` stays a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) not in ("timestamp", "merge", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (_TAG + "str", _TAG + "seq", _TAG + "map", None)},
        **{_TAG + kind: _scalar(kind) for kind in ("null", "bool", "int", "float")},
    }
    _depth = 0

    def descend_resolver(self, current_node: yaml.Node, current_index: Any) -> None:
        # called for every node before its children are read: libyaml's own recursion ends in a crash, not in an error
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(_TOO_DEEP)

    def ascend_resolver(self) -> None:
        self._depth -= 1

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {_shown(key)} stands twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(path: Path) -> Any:
    """The file's content as plain Python data. Raises :class:`YAMLFileError` where it cannot be read or is no YAML."""
    try:
        text = read_text(path, MAX_BYTES)
    except UnicodeDecodeError as e:
        raise YAMLFileError(path, f"{e}, wanted YAML in UTF-8") from None
    except OSError as e:
        raise YAMLFileError(path, f"cannot be read: {e.strerror or e}") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = e.problem or e.context or ""
        if "maximum nesting depth" in problem:  # libyaml from 0.2.6 on has a bound of its own, which its look-ahead may meet before ours
            where, problem = "", _TOO_DEEP
        raise YAMLFileError(path, f"{where}{_cut(problem, MAX_SHOWN)}, wanted YAML") from None
    except yaml.reader.ReaderError as e:
        raise YAMLFileError(path, f"position {e.position}: {e.reason}, wanted YAML") from None
    except yaml.YAMLError as e:
        raise YAMLFileError(path, f"{e}, wanted YAML") from None


def field_name(path: Sequence[int | str]) -> str:
    """``entries[3].config.threads``; a key that is no plain word is quoted."""
    plain = re.compile(r"[\w-]+")
    parts = (f"[{p}]" if isinstance(p, int) else "." + (_cut(p, MAX_SHOWN) if plain.fullmatch(p) else _shown(p)) for p in path)
    return "".join(parts).removeprefix(".") or "top level"


def first_complaint(error: ValidationError) -> str:
    """A pydantic error as ``entries[3].config.threads: got 'x', wanted an integer (and 2 more)``."""
    details = error.errors(include_url=False)
    first, rest = details[0], len(details) - 1
    where = field_name(first["loc"][:-1] if first["loc"][-1:] == ("[key]",) else first["loc"])
    if first["type"] == "missing":
        what = "missing, wanted a value"
    elif first["type"] == "extra_forbidden":
        what = "unknown field, wanted it removed or spelt right"
    else:
        message = first["msg"].removeprefix("Value error, ")
        wanted = f"wanted {message.removeprefix('Input should be ')}" if message.startswith("Input should be ") else message
        what = f"got {_shown(first['input'])}, {wanted}"
    return f"{where}: {what}" + (f" (and {rest} more)" if rest else "")
