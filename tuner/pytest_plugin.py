"""``pytest --mhc-latency``: tests of your own kernels that fail when a kernel has become slower. Comes with the package; needs no setup.

    def test_my_kernel(mhc_latency):
        x = torch.randn(8192, 4, 2560, device="cuda", dtype=torch.bfloat16)
        mhc_latency(lambda: my_kernel(x), bytes_moved=2 * x.nbytes)

Without ``--mhc-latency`` such tests are skipped; ``-m mhc_latency`` picks them. What the fixture takes, measures and returns is told by
:class:`tuner.latency_fixture.MHCLatency`.

    pytest --mhc-latency -m mhc_latency --mhc-latency-update     # write the baselines, .mhc-latency/<device>.json; commit them
    pytest --mhc-latency -m mhc_latency                          # compare; without a baseline of this device a test passes, and says so
    pytest --mhc-latency -m mhc_latency --mhc-latency-strict     # without a baseline, or nothing timed, it fails

A kernel fails when it is slower than its baseline by more than ``--mhc-latency-tolerance`` (0.05), by more than 0.5 us, and by more than
its noise band, which stands in the baseline, or that of the runs at hand where this is wider (tuner/regression.py has the rule). Each
update adds the runs of one more process to the baseline while the time stays what it was, up to eight of them, and makes the band of all:
three updates after another teach it what processes differ by. An update with another time (a regression that is accepted, an improvement)
begins anew. Only tests that ran and did not fail are updated, on a device that was steady; all others keep theirs.
``--mhc-latency-baseline`` (or the ini option ``mhc_latency_baseline``) names another file, ending in .json, or another folder, which holds
a file a device.

Not with pytest-xdist: other workers would run beside what is timed, on a CPU on the same cores. With workers ``--mhc-latency`` is refused;
say ``-n0``. Of other processes, those that time by tuner/device_lock.py wait for each other.

This module is loaded by every pytest run where the package is installed. It imports nothing but pytest; all else waits for the option.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tuner.latency_fixture import MHCLatency, Session

FIXTURE = "mhc_latency"
OPTION = "--mhc-latency"
UNUSED = "timed nothing; wanted mhc_latency(lambda: my_kernel(x))"
WHY_SKIPPED = f"times a kernel, which takes {OPTION}"
#: Both names that this module may be registered under: by the entry point, and by ``-p`` or a conftest's ``pytest_plugins``.
NAMES = ("mhc-latency", __name__)

_SESSION = pytest.StashKey["Session"]()
_FAILED = pytest.StashKey[bool]()


class _Placeholder:
    """Stands for this module under its other name: asked to load one module under two names, pytest would end."""


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a share from 0 to below 1, such as 0.05")
    return value


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    for name in NAMES:
        if not pluginmanager.has_plugin(name):
            pluginmanager.register(_Placeholder(), name)
    group = parser.getgroup("mhc-latency", "latencies of kernels (fixture mhc_latency)")
    group.addoption(OPTION, action="store_true", help="Run the tests that time kernels; they are skipped otherwise.")
    group.addoption(f"{OPTION}-update", action="store_true", help="Write what was measured as the baseline; nothing regresses then.")
    group.addoption(f"{OPTION}-strict", action="store_true", help="Fail where there is no baseline of this device, or nothing timed.")
    group.addoption(
        f"{OPTION}-tolerance", type=_share, default=0.05, metavar="SHARE", help="Slower by this share is not slower. Default: 0.05."
    )
    group.addoption(
        f"{OPTION}-baseline",
        metavar="PATH",
        help="Baselines: a file .json, or a folder with one a device. Default: the ini option mhc_latency_baseline, else .mhc-latency.",
    )
    parser.addini("mhc_latency_baseline", "As --mhc-latency-baseline, from the folder of the ini file.", default="")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{FIXTURE}: times a kernel (the fixture of that name sets it); skipped without {OPTION}")
    if not config.getoption("mhc_latency"):
        if config.getoption("mhc_latency_update"):
            raise pytest.UsageError(f"{OPTION}-update: nothing is measured without {OPTION}")
        return
    if config.getoption("collectonly"):
        return
    if (config.getoption("dist", "no") != "no" and config.getoption("tx", None)) or hasattr(config, "workerinput"):
        raise pytest.UsageError(f"{OPTION}: with pytest-xdist other workers would run beside what is timed; wanted no workers: -n0")
    from tuner.errors import TuneError
    from tuner.latency_baseline import read_all

    try:
        read_all(_place(config))
    except TuneError as e:
        raise pytest.UsageError(str(e)) from None


def _place(config: pytest.Config) -> Path:
    """The file or folder of baselines: the option's from where pytest was called, the ini's from where that is."""
    given, ini = config.getoption("mhc_latency_baseline"), config.getini("mhc_latency_baseline")
    if given:
        return config.invocation_params.dir / given
    if ini:
        return (config.inipath.parent if config.inipath else config.rootpath) / str(ini)
    return config.rootpath / ".mhc-latency"


def pytest_itemcollected(item: pytest.Item) -> None:
    if FIXTURE not in getattr(item, "fixturenames", ()):
        return
    item.add_marker(FIXTURE)
    if not item.config.getoption("mhc_latency"):
        item.add_marker(pytest.mark.skip(reason=WHY_SKIPPED))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = not report.passed
    return report


@pytest.fixture(name=FIXTURE)
def _mhc_latency(request: pytest.FixtureRequest) -> Iterator[MHCLatency]:
    """Time a call and compare it with its baseline: ``mhc_latency(call, bytes_moved=None, name=None, device=None)``, with --mhc-latency."""
    if not request.config.getoption("mhc_latency"):
        pytest.skip(WHY_SKIPPED)  # asked for by getfixturevalue
    from tuner.errors import TuneError
    from tuner.latency_fixture import MHCLatency

    latency = MHCLatency(_session(request.config), request.node.nodeid, request.node.user_properties)
    yield latency
    # a test that was interrupted has not failed
    failed = request.node.stash.get(_FAILED, False)
    try:
        latency.finish(failed)
    except TuneError as e:
        raise pytest.UsageError(str(e)) from None
    if latency.unused and request.node.stash.get(_FAILED, None) is False:
        if request.config.getoption("mhc_latency_strict"):
            pytest.fail(f"{FIXTURE} {UNUSED}", pytrace=False)
        request.node.warn(pytest.PytestWarning(f"{FIXTURE} {UNUSED}"))


def _session(config: pytest.Config) -> Session:
    if _SESSION not in config.stash:
        from tuner.latency_fixture import Session
        from tuner.regression import Rule

        config.stash[_SESSION] = Session(
            place=_place(config),
            rule=Rule(tolerance=config.getoption("mhc_latency_tolerance")),
            update=config.getoption("mhc_latency_update"),
            strict=config.getoption("mhc_latency_strict"),
        )
    return config.stash[_SESSION]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    lines = session.summary() if session is not None else []
    if lines:
        terminalreporter.section("mhc latency", sep="=")
        for line, verdict in lines:
            terminalreporter.line(line, red=verdict == "regressed", green=verdict == "improved")
