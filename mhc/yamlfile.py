"""Read a YAML file that people edit by hand: plain data, no duplicate keys, and every complaint on one line."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError


class YAMLFileError(ValueError):
    """What is wrong with a file, on one line: the file, the field or the position, what was found and what was wanted."""

    def __init__(self, path: Path | str, message: str) -> None:
        self.path, self.message = path, message
        super().__init__(" ".join(f"{path}: {message}".split()))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the base is chosen at run time
    """PyYAML's safe loader, less two surprises: a repeated key is an error, and an unquoted date stays a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {reprlib.repr(key)} stands twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(path: Path) -> Any:
    """The file's content as plain Python data. Raises :class:`YAMLFileError` where it cannot be read or is no YAML."""
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, Loader=_Loader)
    except OSError as e:
        raise YAMLFileError(path, f"cannot be read: {e.strerror or e}") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YAMLFileError(path, f"{where}{e.problem or e.context}, wanted YAML") from None
    except RecursionError:
        raise YAMLFileError(path, "nested too deeply, wanted YAML of a few levels") from None
    except (yaml.YAMLError, ValueError, TypeError) as e:  # bad encoding, a number no Python int may hold, an unhashable key
        raise YAMLFileError(path, f"{e}, wanted YAML") from None


def first_complaint(error: ValidationError) -> str:
    """A pydantic error as ``entries[3].config.threads: got 'x', wanted an integer (and 2 more)``."""
    details = error.errors(include_url=False)
    first, rest = details[0], len(details) - 1
    where = ""
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if first["type"] == "missing":
        what = "missing, wanted a value"
    elif first["type"] == "extra_forbidden":
        what = "unknown field, wanted it removed or spelt right"
    else:
        message = first["msg"].removeprefix("Value error, ")
        wanted = f"wanted {message.removeprefix('Input should be ')}" if message.startswith("Input should be ") else message
        what = f"got {reprlib.repr(first['input'])}, {wanted}"
    return f"{where or 'top level'}: {what}" + (f" (and {rest} more)" if rest else "")
