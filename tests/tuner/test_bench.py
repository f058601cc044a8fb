"""tuner/bench.py: same function before same clock, failures as rows, tables that add up."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tl_kernels import KERNELS, reference
from tuner import bench
from tuner.bench_rivals import GRADIENTS, RIVALS, Case, Rival, expected, plain_boundary

CPU = torch.device("cpu")
TINY = "--gpu cpu --tokens 8 --dim 32 --n 2 --rounds 3"


def tiny(dtype: torch.dtype = torch.float32, n: int = 3) -> Case:
    return Case.random(6, n, 16, dtype, CPU, seed=3)


def failing(case: Case):
    raise RuntimeError("first line\nno such function on this machine")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    assert bench.main(f"{TINY} --rivals ours,eager --out {out}".split()) == 0
    return {"json": json.loads((out / "boundary.json").read_text()), "md": (out / "boundary.md").read_text(), "png": out / "boundary.png"}


def test_result_says_what_was_measured_where_and_how(result):
    data = result["json"]
    assert data["hardware"]["name"]
    assert data["versions"]["torch"] == torch.__version__
    assert data["command"].startswith("python -m tuner.bench --gpu cpu --tokens 8")
    assert data["method"] == "cpu"
    assert data["case"]["dtype"] == "bfloat16"
    assert [row["rival"] for row in data["rows"]] == ["ours", "eager"]
    for row in data["rows"]:
        assert row["agrees"], row["errors"]
        assert set(row["errors"]) == {"y", *GRADIENTS}
        assert set(row["times"]) == {"forward_eager", "forward_backward_eager"}
        assert row["times"]["forward_eager"]["lo"] <= row["times"]["forward_eager"]["us"] <= row["times"]["forward_eager"]["hi"]
    assert result["png"].read_bytes().startswith(b"\x89PNG")


def test_share_is_floor_over_time(result):
    data = result["json"]
    unit = 8 * 32 * 2
    for p, units in (("forward", 6), ("forward_backward", 19)):  # 2n + 2 and 7n + 5 at n = 2
        floor = units * unit / data["copy_gbps"] / 1e3
        for row in data["rows"]:
            time = row["times"][f"{p}_eager"]
            assert time["share"] == pytest.approx(floor / time["us"])


def test_floor_is_that_of_the_design_at_four_streams(tmp_path):
    assert bench.main(f"{TINY.replace('--n 2', '--n 4')} --rivals eager --no-kernels --out {tmp_path}".split()) == 0
    assert json.loads((tmp_path / "boundary.json").read_text())["case"]["floor_units"] == {"forward": 10, "forward_backward": 33}


def test_every_kernel_has_a_line_with_bytes_and_rate(result):
    rows = {row["kernel"]: row for row in result["json"]["kernels"]}
    assert list(rows) == list(KERNELS)
    for name, row in rows.items():
        assert row["failure"] is None, f"{name}: {row['failure']}"
        assert row["bytes"] == KERNELS[name].bytes_moved(KERNELS[name].problem(2, 32), 8)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert f"| {name} |" in result["md"]


def test_table_is_printed_last(capsys, tmp_path):
    bench.main(f"{TINY} --rivals eager --no-kernels --out {tmp_path}".split())
    assert capsys.readouterr().out.endswith((tmp_path / "boundary.md").read_text())


@pytest.mark.parametrize("name", ["ours", "eager"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rivals_compute_the_boundary_of_the_specification(name, dtype, limit):
    entrant = bench.Entrant(name, RIVALS[name], tiny(dtype))
    assert not entrant.row["failures"]
    assert max(entrant.row["errors"].values()) < limit


@pytest.mark.slow
def test_the_compiled_rival_is_the_specification():
    entrant = bench.Entrant("compile", RIVALS["compile"], tiny())
    assert not entrant.row["failures"]
    assert max(entrant.row["errors"].values()) < 1e-5


def test_liger_parameters_go_into_its_layout_and_back(monkeypatch):
    # what its documentation says it computes, in PyTorch: H_res starts with rows and is stored [target, source]
    def coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, *, allow_fp32, pre_eps):
        assert allow_fp32
        n = x.shape[1]
        z, rinv = reference.project(x, phi.T)
        scale = torch.stack([alpha_pre, alpha_post, alpha_res])
        H_pre, H_post, h_res = reference.activate(z, rinv, scale, b, pre_eps=pre_eps)
        assert h_res.shape[1:] == (n, n)
        return H_pre, H_post, reference.sinkhorn(h_res.transpose(1, 2), order="rows_first")

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_mhc_coeffs = coeffs
    functional.liger_mhc_pre = reference.pre
    functional.liger_mhc_post_res = reference.post_res
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    entrant = bench.Entrant("liger", RIVALS["liger"], tiny())
    assert not entrant.row["failures"]
    assert max(entrant.row["errors"].values()) < 1e-5


def test_sinkhorn_order_is_seen_by_the_check():
    case = tiny()
    case = replace(case, scale=3 * case.scale)
    ours = expected(case, RIVALS["ours"])
    other = expected(case, replace(RIVALS["ours"], order="rows_first"))
    assert bench.relative_errors(other, ours)["y"] > 1e-5


def test_a_rival_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RIVALS", {**RIVALS, "liger": Rival("broken one", failing)})
    assert bench.main(f"{TINY} --rivals liger,eager --no-kernels --out {tmp_path}".split()) == 0
    broken, eager = json.loads((tmp_path / "boundary.json").read_text())["rows"]
    assert broken["failures"] == ["RuntimeError: no such function on this machine"]
    assert not broken["times"]
    assert eager["times"]
    assert "| broken one | - | - |" in capsys.readouterr().out


def test_a_rival_that_computes_something_else_is_marked(monkeypatch, tmp_path, capsys):
    def twice(case: Case):
        boundary = RIVALS["eager"].make(case)
        return replace(boundary, forward=lambda: boundary.forward() * 2)

    monkeypatch.setattr(bench, "RIVALS", {**RIVALS, "ours": Rival("ours, doubled", twice)})
    assert bench.main(f"{TINY} --rivals ours --no-kernels --out {tmp_path}".split()) == 1
    assert "ours, doubled: DIFFERS from float64; largest relative error 1.0e+00" in capsys.readouterr().out


def test_a_failing_kernel_is_a_line(monkeypatch):
    def broken(*args):
        raise RuntimeError("nvcc fatal: no such flag")

    monkeypatch.setattr(bench, "get_launcher", broken)
    monkeypatch.setattr(bench.profile, "choose", lambda *args: bench.profile.Choice({}, "tilelang", "default"))
    row = bench.bench_kernel("pre", tiny(), 2, bench.Sampler(CPU), 10.0)
    assert row["failure"] == "RuntimeError: nvcc fatal: no such flag"


def test_errors_that_are_not_numbers_are_infinite():
    want = {"y": torch.ones(3, dtype=torch.float64)}
    assert bench.relative_errors({"y": torch.tensor([1.0, math.nan, 1.0])}, want)["y"] == math.inf
    assert bench.relative_errors({"y": torch.tensor([1.0, 1.0, 1.0])}, want)["y"] == 0


def test_rounds_are_interleaved_and_start_elsewhere_each_time():
    order: list[str] = []
    calls = [(lambda name=name: order.append(name), 1, False) for name in "abc"]
    samples = bench.Sampler(CPU).interleaved(calls, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(s) for s in samples] == [3, 3, 3]


def test_cases_are_random_and_repeatable():
    one, same, other = tiny(), tiny(), Case.random(6, 3, 16, torch.float32, CPU, seed=4)
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.fn, same.fn)
    assert not torch.equal(one.x, other.x)
    y = plain_boundary(one.x, one.fn, one.base, one.scale)
    assert y.shape == one.x.shape


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [("--rivals ours,ligre", "did you mean 'liger'?"), ("--tokens 0", "wanted 1 or more"), ("--n 9", "--n"), ("--dtype int8", "--dtype")],
)
def test_bad_arguments(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments.split())
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_another_gpu_is_one_line(capsys):
    assert bench.main(["--gpu", "no-such-gpu"]) == 2
    assert capsys.readouterr().err.startswith("--gpu no-such-gpu: found ")


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench.main(f"{TINY} --rivals eager --no-kernels --out {tmp_path / 'file' / 'out'}".split()) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.gpu
def test_graph_replay_follows_its_inputs():
    x = torch.ones(4, device="cuda")
    replay, out = bench.capture(lambda: x * 2)
    x.fill_(3)
    replay()
    assert out.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_all_of_it_on_the_gpu(tmp_path):
    assert bench.main(f"--tokens 512 --dim 256 --rounds 5 --rivals ours,eager --out {tmp_path}".split()) == 0
    data = json.loads((tmp_path / "boundary.json").read_text())
    keys = {f"{p}_{kind}" for p in ("forward", "forward_backward") for kind in ("graph", "eager")}
    for row in data["rows"]:
        assert set(row["times"]) == keys, row["failures"]
        assert row["peak_mib"] > 0
    assert all(row["failure"] is None for row in data["kernels"])
