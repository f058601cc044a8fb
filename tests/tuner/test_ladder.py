"""tuner/ladder.py: a configuration is given up only where its bytes alone take longer than the best time."""

import json
from pathlib import Path

import pytest

from tl_kernels import KERNELS
from tuner.ladder import KEPT_BYTES, MARGIN, bytes_of, hopeless, least_us

RESULTS = Path(__file__).resolve().parents[2] / "results" / "h100"
COPY = 3000.0


def of(name, C=2560, T=8192):
    kernel = KERNELS[name]
    return kernel, kernel.problem(4, C), T


def test_splits_are_written_once_each():
    kernel, p, T = of("project_parts")
    one, many = {"splits": 1}, {"splits": 32}
    assert bytes_of(kernel, p, T, one) == kernel.bytes_moved(p, T)
    assert bytes_of(kernel, p, T, many) - bytes_of(kernel, p, T, one) == 31 * (p.M + 1) * T * 4
    kernel, p, T = of("project_bwd")
    assert bytes_of(kernel, p, T, {"splits": 8}) - kernel.bytes_moved(p, T) == 7 * p.M * p.K * 4


def test_without_splits_it_is_the_floor():
    kernel, p, T = of("post_res")
    assert bytes_of(kernel, p, T, {"block_C": 640, "threads": 80}) == kernel.bytes_moved(p, T)


def test_a_configuration_is_given_up_only_beyond_the_bound():
    kernel, p, T = of("project_parts")
    cfg = {**kernel.default(p), "splits": 32}
    least = least_us(kernel, p, T, cfg, COPY)
    assert least == pytest.approx((bytes_of(kernel, p, T, cfg) - KEPT_BYTES) / (COPY * 1e3 * (1 + MARGIN)))
    assert hopeless(kernel, p, T, cfg, COPY, least * 1.001) is None
    reason = hopeless(kernel, p, T, cfg, COPY, least * 0.999)
    assert f"{bytes_of(kernel, p, T, cfg) / 1e6:.1f} MB" in reason
    assert f"at least {least:.1f} us" in reason
    # with one split instead the same best leaves hope
    assert hopeless(kernel, p, T, {**cfg, "splits": 1}, COPY, least * 0.999) is None


def test_what_stays_in_the_cache_says_nothing():
    kernel, p, T = of("project_parts", T=64)
    assert hopeless(kernel, p, T, {**kernel.default(p), "splits": 32}, COPY, 1e-3) is None


def test_never_before_there_is_a_best_and_never_the_default():
    kernel, p, T = of("project_parts")
    cfg = {**kernel.default(p), "splits": 32}
    assert hopeless(kernel, p, T, cfg, COPY, None) is None
    assert hopeless(kernel, p, T, cfg, 0.0, 1.0) is None
    assert hopeless(kernel, p, T, kernel.default(p), COPY, 1e-3) is None


def test_nothing_ever_measured_on_the_h100_was_faster_than_its_bound():
    checked = 0
    for name in ("tune.json", "tune_whole.json"):
        data = json.loads((RESULTS / name).read_text())
        for run in data.get("runs", [data]):
            for study in run["studies"]:
                kernel = KERNELS[study["kernel"]]
                p = kernel.problem(study["n"], study["C"][0], study["dtype"])
                for trial in study["trials"]:
                    if trial["time_us"] is not None:
                        least = least_us(kernel, p, study["tokens"], trial["config"], run["copy_gbps"])
                        assert trial["time_us"] > 1.03 * least, (study["study"], trial["config"])
                        checked += 1
    assert checked > 900
