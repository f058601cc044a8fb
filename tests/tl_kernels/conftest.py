"""Compiles what the collected tests will need on the CPU target ahead of them, on all cores: half the time of a run is g++."""

import os
from concurrent.futures import ThreadPoolExecutor

from tests.tl_kernels.checks import launcher
from tl_kernels.cpu import available

_POOL = ThreadPoolExecutor(os.cpu_count())


def pytest_collection_finish(session):
    # under pytest-xdist every worker would compile everything: there tests compile side by side anyway
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER") or not available():
        return
    for item in session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("device") == "cpu" and "n" in params and "name" in params:
            # a failure is the test's to report: it asks again
            _POOL.submit(launcher, params["name"], "cpu", params["n"], params["C"], params.get("dtype", "bfloat16"), params.get("cfg"))


def pytest_sessionfinish():
    _POOL.shutdown(wait=False, cancel_futures=True)
