"""tuner/bench.py: one run from request to files, on the CPU; what the user can mend; Ctrl-C; rounds."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mhc import use_backend
from tl_kernels import KERNELS
from tuner import bench as module
from tuner import bench_entrant, bench_kernels, bench_plan, bench_team
from tuner.bench import bench, take_rounds
from tuner.bench_case import GRADIENTS, Case, Shape
from tuner.bench_entrant import release
from tuner.bench_plan import BenchRequest, make_plan
from tuner.bench_report import _kernels
from tuner.bench_rivals import RIVALS, Boundary, Rival
from tuner.errors import INTERRUPTED, TuneError
from tuner.timing import Clock

TINY = BenchRequest("mhc-tune bench ...", gpu="cpu", shapes="8x2x32", rivals="ours,eager", tokens="none", rounds=3, kernels=False)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Ours by the PyTorch reference: what is tested is the benchmark."""
    with use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_team, "DECODE_LAYERS", 2)
        yield
    release()


def run(request: BenchRequest, out: Path) -> dict:
    code = bench(replace(request, out=out))
    return {"code": code, **json.loads((out / "bench.json").read_text())}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    done = run(replace(TINY, shapes="8x2x32,4x4x16:ours", tokens="1,2", kernels=True, layers="1,2"), out)
    return {"json": done, "md": (out / "bench.md").read_text(), "png": out / "bench.png"}


def test_result_says_what_was_measured_where_and_how(result):
    data = result["json"]
    assert data["code"] == 0
    assert data["complete"]
    assert data["hardware"]["name"]
    assert data["versions"]["torch"] == torch.__version__
    assert data["command"] == "mhc-tune bench ..."
    assert (data["method"], data["dtype"]) == ("cpu", "bfloat16")
    assert [(s["T"], s["n"], s["C"]) for s in data["shapes"]] == [(8, 2, 32), (4, 4, 16)]
    assert result["png"].read_bytes().startswith(b"\x89PNG")


def test_rows_are_alone_stacked_and_chained(result):
    first, second = result["json"]["shapes"]
    ours = [("ours", 1, False), ("ours", 2, False), ("ours", 2, True)]
    assert [(r["rival"], r["layers"], r["chained"]) for r in first["rows"]] == [*ours, ("eager", 1, False)]
    assert [(r["rival"], r["layers"], r["chained"]) for r in second["rows"]] == ours  # narrowed by the shape
    for row in first["rows"]:
        assert row["agrees"], row
        assert set(row["errors"]) == {"y", *GRADIENTS}
        assert set(row["times"]) == {"forward_eager", "forward_backward_eager"}
        assert row["times"]["forward_eager"]["lo"] <= row["times"]["forward_eager"]["us"] <= row["times"]["forward_eager"]["hi"]
        assert row["times"]["forward_eager"]["samples"] == 3


def test_share_is_floor_over_time(result):
    entry = result["json"]["shapes"][0]
    for p, units in (("forward", 6), ("forward_backward", 19)):  # 2n + 2 and 7n + 5 at n = 2
        floor = units * 8 * 32 * 2 / entry["copy_gbps"] / 1e3
        for row in entry["rows"]:
            time = row["times"][f"{p}_eager"]
            assert time["share"] == pytest.approx(floor / time["us"])


def test_decode_has_every_entrant_at_every_token_count(result):
    rows = result["json"]["shapes"][0]["decode"]
    assert {(r["rival"], r["chained"], r["T"]) for r in rows} == {
        (*who, T) for who in (("ours", False), ("ours", True), ("eager", False)) for T in (1, 2)
    }
    assert all(r["agrees"] and r["times"]["forward_eager"]["us"] > 0 for r in rows)
    assert {r["T"] for r in rows if "host_us" in r} == {2}


def test_every_kernel_has_a_line_with_bytes_and_rate(result):
    rows = {row["kernel"]: row for row in result["json"]["shapes"][0]["kernels"]}
    assert list(rows) == [name for name, kernel in KERNELS.items() if kernel.unserved_on(kernel.problem(2, 32), "cpu") is None]
    for name, row in rows.items():
        assert row["failure"] is None, f"{name}: {row['failure']}"
        assert row["bytes"] == KERNELS[name].bytes_moved(KERNELS[name].problem(2, 32), 8)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert f"| {name} |" in result["md"]


def test_table_is_printed_last(capsys, tmp_path):
    run(replace(TINY, rivals="eager"), tmp_path)
    assert capsys.readouterr().out.endswith((tmp_path / "bench.md").read_text())


def test_a_rival_that_is_not_installed_is_named_but_no_row(tmp_path, monkeypatch, capsys):
    def make(case: Case) -> Boundary:
        import no_such_package_at_all  # noqa: F401

    _plant(monkeypatch, {"ours": RIVALS["ours"], "liger": Rival("Liger", make, isolated=False)})
    data = run(replace(TINY, rivals=None, layers="1"), tmp_path)
    assert data["code"] == 0
    assert [row["rival"] for row in data["shapes"][0]["rows"]] == ["ours"]
    assert list(data["missing"]) == ["liger"]
    assert "Not installed, so not measured: liger." in capsys.readouterr().out


def test_a_rival_asked_for_by_name_that_is_not_installed_is_a_row(tmp_path, monkeypatch, capsys):
    def make(case: Case) -> Boundary:
        import no_such_package_at_all  # noqa: F401

    _plant(monkeypatch, {"eager": RIVALS["eager"], "liger": Rival("Liger", make, isolated=False)})
    data = run(replace(TINY, rivals="liger,eager", layers="1"), tmp_path)
    broken = next(row for row in data["shapes"][0]["rows"] if row["rival"] == "liger")
    assert "not installed" in broken["failures"][0]
    assert "| Liger | - | - |" in capsys.readouterr().out


def _plant(monkeypatch, rivals: dict[str, Rival]) -> None:
    for where in (bench_team, bench_entrant):
        monkeypatch.setattr(where, "rival", lambda name: rivals[name])
    monkeypatch.setattr(bench_plan, "rival_names", lambda: list(rivals))


def test_ours_that_computes_something_else_is_marked_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def twice(case: Case) -> Boundary:
        boundary = RIVALS["eager"].make(case)
        return replace(boundary, forward=lambda: boundary.forward() * 2)

    _plant(monkeypatch, {"ours": Rival("ours, doubled", twice, isolated=False)})
    assert run(replace(TINY, rivals="ours", layers="1"), tmp_path)["code"] == 1
    assert "ours, doubled: DIFFERS from float64; largest relative error 1.0e+00" in capsys.readouterr().out


def test_a_failing_kernel_is_a_line(monkeypatch):
    def broken(*args):
        raise RuntimeError("nvcc fatal: no such flag")

    monkeypatch.setattr(bench_kernels, "_call", broken)
    (row,) = bench_kernels.bench_kernel("pre", Shape(4, 2, 16), "float32", 2, Clock("cpu"), COPY)
    assert row["failure"] == "RuntimeError: nvcc fatal: no such flag"


@pytest.mark.parametrize(("mode", "impl"), [("auto", "reference"), ("tilelang", "tilelang")])
def test_a_row_says_what_was_timed(monkeypatch, mode, impl):
    """On the CPU, without an entry: PyTorch, but where programs are asked for."""
    timed = []
    monkeypatch.setattr(bench_kernels, "run_reference", lambda *args: timed.append("reference"))
    monkeypatch.setattr(bench_kernels, "get_launcher", lambda *args: lambda *inputs: timed.append("tilelang"))
    with use_backend(mode):
        (row,) = bench_kernels.bench_kernel("pre", Shape(4, 2, 16), "float32", 2, Clock("cpu"), COPY)
    assert set(timed) == {impl}
    assert (row["impl"], row["program"]) == (impl, "default")
    table = "\n".join(_kernels({"kernels": [row]}, graph=False))
    assert ("| PyTorch |" in table) == (impl == "reference")
    assert ("| default |" in table) == (impl == "tilelang")


def test_kernels_are_compiled_ahead_once_each_where_tilelang_serves():
    shape, cpu = Shape(4, 2, 16), torch.device("cpu")
    assert bench_kernels.choices(shape, "float32", [1], cpu) == []  # the reference serves here
    with use_backend("tilelang"):
        programs = bench_kernels.choices(shape, "float32", [1, 2], cpu)
    keys = [(kernel.name, tuple(sorted(config.items()))) for kernel, _, config in programs]
    assert len(set(keys)) == len(keys)
    assert {name for name, _ in keys} <= set(KERNELS)
    with use_backend("tilelang"):
        needed = {kernel.name for kernel, *_ in bench_kernels.choices(shape, "float32", [1, 2], cpu, alone=False)}
    assert {"project_parts", "streams_grad", "post_res"} <= needed < {name for name, _ in keys}
    assert not needed & {"project", "sinkhorn", "post_res_bwd"}


#: A call in the place of the copy, and its bytes.
COPY = (lambda: None, 1000)


class Scripted:
    """An entrant whose samples are given."""

    def __init__(self, name: str, order: list[str], stop_at: int | None = None) -> None:
        self.row: dict = {"times": {}}
        self.name, self.order, self.stop_at = name, order, stop_at

    def sample(self) -> dict[str, float]:
        self.order.append(self.name)
        if self.stop_at is not None and len(self.order) > self.stop_at:
            raise KeyboardInterrupt
        return {"forward_eager": float(len(self.order))}


def test_rounds_are_interleaved_and_start_elsewhere_each_time():
    order: list[str] = []
    entrants = [Scripted(name, order) for name in "abc"]
    assert take_rounds(entrants, 3, 100.0, lambda: None) == 3
    assert "".join(order) == "abc" + "abcbcacab"  # one to warm up
    assert [e.row["times"]["forward_eager"]["samples"] for e in entrants] == [3, 3, 3]
    assert entrants[0].row["times"]["forward_eager"]["us"] == 9.0  # samples 4, 9, 11; the warm-up's is not among them


def test_time_ends_the_rounds_but_not_before_there_are_some():
    order: list[str] = []
    assert take_rounds([Scripted("a", order)], 50, 0.0, lambda: None) == module.LEAST_ROUNDS


def test_rounds_that_are_interrupted_count():
    order: list[str] = []
    entrants = [Scripted("a", order), Scripted("b", order, stop_at=7)]
    with pytest.raises(KeyboardInterrupt):
        take_rounds(entrants, 9, 100.0, lambda: None)
    assert entrants[0].row["times"]["forward_eager"]["samples"] >= 2


def test_ctrl_c_writes_what_there_is(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "bench_kernel", interrupted)
    data = run(replace(TINY, rivals="eager", kernels=True), tmp_path)
    assert data["code"] == INTERRUPTED
    assert not data["complete"]
    assert data["shapes"][0]["rows"][0]["times"]
    assert "Interrupted" in (tmp_path / "bench.md").read_text()
    err = capsys.readouterr().err
    assert "interrupted; what was measured is in" in err
    assert "Traceback" not in err


def test_ctrl_c_before_anything_was_measured_leaves_an_earlier_result_as_it_was(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    before = {name: f"old {name}" for name in ("bench.json", "bench.md", "bench.png")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "take_rounds", interrupted)
    assert bench(replace(TINY, out=tmp_path)) == INTERRUPTED
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    err = capsys.readouterr().err
    assert "interrupted before anything was measured" in err
    assert "what was measured is in" not in err


@pytest.mark.parametrize("name", ["replace_file", "chart"])
def test_on_a_full_disk_it_prints_what_was_measured_and_ends_in_one_line(tmp_path, monkeypatch, capsys, name):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(TuneError, match=r"^--out .*: cannot be written: No space left on device$"):
        bench(replace(TINY, out=tmp_path, rivals="eager", layers="1"))
    assert "| PyTorch eager |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"shapes": "8x2x32:liger", "rivals": "ours"},
            "--shapes: 8 x 2 x 32 asks for liger, wanted some of the rivals that take part: ours",
        ),
        ({"shapes": "8x2x32,4x2x32:ours+tile-kernels", "rivals": "ours,eager"}, "4 x 2 x 32 asks for tile-kernels"),
        ({"shapes": "8x2x32:tile-kernels", "rivals": None}, "8 x 2 x 32 asks for tile-kernels"),  # only on CUDA
        ({"rivals": "ours,ligre"}, "did you mean 'liger'"),
        ({"shapes": "8x2x32:ours+egaer"}, "did you mean 'eager'"),
        ({"shapes": "8x2"}, "wanted TxnxC"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"layers": "0"}, "--layers: got '0'"),
        ({"layers": ""}, "--layers"),
        ({"tokens": "few"}, "--tokens: got 'few'"),
        ({"rival_envs": ("liger",)}, "wanted NAME=PATH"),
        ({"rival_envs": ("liger=/no/such/place",)}, "does not exist"),
        ({"rival_envs": ("ligre=/",)}, "did you mean 'liger'"),
        ({"gpu": "no-such-gpu"}, "--gpu no-such-gpu: "),
        ({"profile": "no-such-profile"}, "no-such-profile"),
    ],
)
def test_what_the_user_can_mend(tmp_path, monkeypatch, change, said):
    monkeypatch.setattr("tuner.hardware._gpu", lambda: None)
    with pytest.raises(TuneError) as caught:
        bench(replace(TINY, out=tmp_path, **change))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match="--out"):
        make_plan(replace(TINY, out=tmp_path / "file" / "out"))
    (tmp_path / "bench.json").mkdir()
    with pytest.raises(TuneError, match=r"--out .*bench\.json: is a folder"):
        make_plan(replace(TINY, out=tmp_path))


def test_defaults_are_small_on_the_cpu(tmp_path):
    plan = make_plan(BenchRequest("", gpu="cpu", out=tmp_path))
    assert plan.shapes == [Shape(64, 4, 256)]
    assert (plan.tokens, plan.rounds, plan.named) == ([1, 16], 7, False)
    assert set(plan.rivals) == set(RIVALS)  # those of tuner/rivals only run on CUDA
    assert make_plan(replace(TINY, out=tmp_path, rivals="tile-kernels")).rivals == ["tile_kernels"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_a_rival_in_a_process_of_its_own_is_timed_beside_ours(tmp_path):
    # compiled for this T alone, and once more for every T of a decode
    data = run(replace(TINY, shapes="300x2x32", dtype="float32", rivals="eager,compile", tokens="2"), tmp_path)
    rows = {row["rival"]: row for row in data["shapes"][0]["rows"]}
    assert set(rows) == {"eager", "compile"}
    assert rows["compile"]["agrees"], rows["compile"]["failures"]
    assert max(rows["compile"]["errors"].values()) < 1e-5
    assert rows["compile"]["inputs"] == rows["eager"]["inputs"]
    assert [row["agrees"] for row in data["shapes"][0]["decode"]] == [True, True]


def test_other_random_numbers_are_said():
    rows = [{"inputs": [1.0, 2.0], "note": ""}, {"inputs": [1.0, 2.5], "note": "a note"}, {"note": "failed early"}]
    module._compare_inputs(rows)
    assert rows[0]["note"] == ""
    assert rows[1]["note"].startswith("a note; other random inputs")


def test_module_and_command_are_the_same(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("tuner.cli.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    module.main(["--gpu", "cpu"])
    assert seen == [["mhc-tune", "bench", "--gpu", "cpu"]]


@pytest.mark.gpu
def test_all_of_it_on_the_gpu(tmp_path):
    request = BenchRequest("", shapes="512x4x256", rivals="ours,eager", tokens="1,16", rounds=5, layers="1,2")
    with use_backend("auto"):
        data = run(request, tmp_path)
    assert data["code"] == 0
    keys = {f"{p}_{kind}" for p in ("forward", "forward_backward") for kind in ("graph", "eager")}
    (entry,) = data["shapes"]
    for row in entry["rows"]:
        assert set(row["times"]) == keys, row["failures"]
        assert row["peak_mib"] > 0
        assert "launches" in row
    for row in entry["kernels"]:
        assert row["failure"] is None
        assert row["registers"] > 0
        assert row["blocks_per_sm"] >= 1
