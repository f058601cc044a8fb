"""In a worker, in place of tuner.fingerprint.fingerprint_job: a fingerprint without a compiler, as the environment says."""

import json
import os

#: JSON: kernel -> fields that differ from FIELDS, or a text: the message of what the compiler raises.
VARIABLE = "TEST_PLANTED_FINGERPRINTS"

FIELDS = {
    "registers": 40,
    "stack": 0,
    "shared": 0,
    "threads": 128,
    "code": 4096,
    "loads": {"16": 20, "4": 5},
    "stores": {"16": 4},
    "copies": {},
    "shared_loads": {"16": 4},
    "shared_stores": {"16": 4},
    "local_loads": 0,
    "local_stores": 0,
    "atomics": 0,
    "barriers": 1,
    "mma": {"HGMMA.64x32x16.F32.BF16": 4},
    "mma_waits": 1,
    "nvcc": "13.0.88",
    "tilelang": "0.1.15",
}


def fingerprint_planted(name, p, cfg, arch):
    change = json.loads(os.environ.get(VARIABLE, "{}")).get(name, {})
    if isinstance(change, str):
        raise RuntimeError(change)
    return {"seconds": 0.25, **FIELDS, **change}
