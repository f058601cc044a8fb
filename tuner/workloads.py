"""The shapes that are tuned, benchmarked and checked: named workloads read from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mhc.profile import WORKLOADS, packaged_dir
from mhc.schema import Dtype
from mhc.yamlfile import YAMLFileError, first_complaint, read_yaml
from tl_kernels.spec import MAX_N


class WorkloadError(YAMLFileError):
    """What is wrong with a workloads file, on one line naming the file and the field."""


def _buckets(value: list[int]) -> list[int]:
    if len(set(value)) < len(value):
        raise ValueError("wanted each bucket once")
    return sorted(value)


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what the kernels index with
Buckets = Annotated[list[Count], Field(min_length=1), AfterValidator(_buckets)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Workload(BaseModel):
    """One model's shape. ``tokens``: the T tuned at on a GPU, ascending; ``cpu_tokens``: on the CPU target."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    n: Annotated[int, Field(ge=1, le=MAX_N)]
    C: Count
    dtype: Dtype = "bfloat16"
    tokens: Buckets
    cpu_tokens: Buckets

    def buckets(self, arch: str) -> list[int]:
        """The T to tune at for an architecture, ``"cpu"`` or ``"sm_90a"``."""
        return self.cpu_tokens if arch == "cpu" else self.tokens


_FILE = TypeAdapter(Annotated[dict[Name, Workload], Field(min_length=1)])


def load_workloads(path: str | Path | None = None) -> dict[str, Workload]:
    """Workloads by name, in the file's order; the packaged file unless ``path`` names another. Raises :class:`WorkloadError`."""
    path = packaged_dir() / f"{WORKLOADS}.yaml" if path is None else Path(path)
    try:
        return _FILE.validate_python(read_yaml(path))
    except ValidationError as e:
        raise WorkloadError(path, first_complaint(e)) from None
    except YAMLFileError as e:
        raise WorkloadError(e.path, e.message) from None
