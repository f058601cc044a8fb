"""JSON files that are committed: checked when they are read, an entry a line when they are written, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mhc.files import read_text, replace_file
from mhc.yamlfile import first_complaint
from tuner.errors import TuneError, writing

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 16 << 20


def read_model(model: type[M], path: Path, where: str, writer: str) -> M | None:
    """The file, or None where there is none. ``where``: what a complaint begins with; ``writer``: the command that writes such files.

    Raises :class:`TuneError` on one line that names the file and the field.
    """
    try:
        return model.model_validate_json(read_text(path, MAX_BYTES))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise TuneError(f"{where}: is no UTF-8, wanted what {writer} writes") from None
    except OSError as e:
        raise TuneError(f"{where}: cannot be read: {e.strerror or e}") from None
    except ValidationError as e:
        raise TuneError(f"{where}: {first_complaint(e)}") from None


def write_model(path: Path, where: str, whole: BaseModel, rows: str) -> None:
    """Write ``whole``; of its field ``rows``, a mapping to models, an entry a line in the order of names, so that a difference shows which.

    Raises :class:`TuneError`, and the file is as it was.
    """
    head = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in whole.model_dump(exclude={rows}).items()]
    entries: Mapping[str, BaseModel] = getattr(whole, rows)
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry.model_dump())}" for name, entry in sorted(entries.items()))
    with writing(where):
        replace_file(path, "{\n" + ",\n".join([*head, f"  {json.dumps(rows)}: {{\n{lines}\n  }}"]) + "\n}\n")
