"""examples/step_time.py: variants that differ in nothing but the residual, and a run that writes what it measured or says why not."""

from __future__ import annotations

import contextlib
import json
import sys
from types import ModuleType

import pytest
import torch

import mhc
from tests.conftest import assert_close
from tests.examples.conftest import import_example

RUN = "--tiny --device cpu --rounds 3 --layers 1 --dim 32 --seq 8"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def step_time() -> ModuleType:
    return import_example("step_time")


@pytest.fixture
def step_model(step_time) -> ModuleType:
    return sys.modules["step_model"]


@pytest.fixture(autouse=True)
def _backend(request):
    """PyTorch serves on the CPU, for the programs take a minute to compile; they are not under test here."""
    with contextlib.nullcontext() if request.node.get_closest_marker("gpu") else mhc.use_backend("reference"):
        yield


def small(step_model: ModuleType, layers: int = 2, trained: bool = True):
    shape = step_model.Shape(layers=layers, dim=32, heads=2, head_dim=8, ffn=48, batch=2, seq=8, n=4)
    return step_model.Model(shape, CPU, trained=trained)


def run_of(step_model: ModuleType, model, *args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    loss = step_model.step(model.stack(*args, **options), model.inputs)
    return loss, model.inputs.grad.clone()


def test_variants_share_every_weight(step_model):
    model = small(step_model)
    plain, ours, formulas = (list(model.stack(variant).parameters()) for variant in step_model.VARIANTS)
    assert len(plain) == 2 * 2 * 3
    assert len(ours) == len(plain) + 4 * 3
    for theirs in (ours[: len(plain)], plain):
        assert all(a is b for a, b in zip(theirs, plain, strict=True))
    assert all(a is b for a, b in zip(formulas, ours, strict=True))
    assert {p.dtype for p in plain} == {torch.bfloat16}
    assert {p.dtype for p in ours[len(plain) :]} == {torch.float32}


def test_mhc_starts_close_to_the_plain_residual(step_model):
    model = small(step_model, trained=False)
    with torch.no_grad():
        plain, ours, formulas = (model.stack(variant)(model.inputs).double() for variant in step_model.VARIANTS)
    assert_close("mhc", ours, plain, rtol=2e-2)
    assert_close("formulas", formulas, ours, rtol=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
def test_mhc_computes_what_the_formulas_do_and_plain_something_else(step_model, layers):
    model = small(step_model, layers)
    (plain, plain_grad), (ours, grad), (want, want_grad) = (run_of(step_model, model, variant) for variant in step_model.VARIANTS)
    assert_close("loss", ours, want, rtol=1e-3)
    assert_close("gradient of the inputs", grad, want_grad, rtol=2e-2)
    assert abs(plain - want) > 1e-2
    assert (plain_grad - want_grad).norm() > 0.1 * want_grad.norm()


def test_the_stack_is_the_chain_of_its_blocks(step_model):
    model = small(step_model)
    blocks = list(zip(model.connections, model.layers, strict=True))
    with torch.no_grad():
        want = mhc.reduce_mean(mhc.chain(mhc.expand(model.inputs, 4), blocks))
        assert torch.equal(model.stack("mhc")(model.inputs), want)


def test_every_step_starts_without_gradients(step_model):
    model = small(step_model, 1)
    stack = model.stack("mhc")
    step_model.step(stack, model.inputs)
    first = [p.grad for p in stack.parameters()]
    step_model.step(stack, model.inputs)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(stack.parameters(), first, strict=True))


@pytest.fixture
def compile_with(step_model, monkeypatch):
    """torch.compile with a backend that needs no compiler, and its cache as it was."""
    compiling = torch.compile

    def use(backend: str) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **options: compiling(function, backend=backend, **options))

    torch._dynamo.reset()
    step_model._compiled.cache_clear()
    yield use
    torch._dynamo.reset()
    step_model._compiled.cache_clear()


@pytest.mark.parametrize(
    ("variant", "backend", "options", "graphs"),
    [
        # a ticket crosses from one compiled block to the next, so autograd's part is under test
        ("mhc", "aot_eager", {"compiled": True}, 3),
        ("plain", "eager", {"compiled": True}, 3),
        ("formulas", "eager", {"compiled_formulas": True}, 2),
    ],
)
def test_one_compilation_serves_all_blocks(step_model, compile_with, variant, backend, options, graphs):
    model = small(step_model, 3)
    want = run_of(step_model, model, variant)
    compile_with(backend)
    torch._dynamo.utils.counters.clear()
    got = run_of(step_model, model, variant, **options)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
    for name, a, b in zip(("loss", "gradient"), got, want, strict=True):
        assert_close(name, a, b, rtol=1e-2)


def test_flops_are_those_of_the_matrix_products(step_model):
    shape = step_model.Shape(layers=3, dim=32, heads=2, head_dim=8, ffn=48, batch=2, seq=8)
    model = step_model.Model(shape, CPU)
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    assert shape.flops == 6 * weights * 16 + 3 * 6 * 2 * 8 * 8 * 16


def test_a_run_writes_a_table_that_says_what_the_json_does(step_time, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert step_time.main(f"{RUN} --out {out}".split()) == 0
    result = json.loads((out / "step_time.json").read_text())
    page = (out / "step_time.md").read_text()
    assert result["complete"]
    assert (result["rounds"], result["tokens"], result["hyper_connections"]) == (3, 16, 2)
    assert result["parameters"]["connections"] == 2 * (24 * 4 * 32 + 24 + 3)
    assert result["copy_gbps"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert RUN in result["command"]
    assert [(row["variant"], row["mode"]) for row in result["rows"]] == [(v, "eager") for v in ("plain", "mhc", "formulas")]
    plain = result["rows"][0]["samples_ms"]
    for row in result["rows"]:
        samples = sorted(row["samples_ms"])
        assert len(samples) == 3
        assert row["ms"] == {"median": samples[1], "lo": samples[0], "hi": samples[2]}
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['variant']}, eager |"))
        assert f"| {samples[1]:.2f} ({samples[0]:.2f}..{samples[2]:.2f}) |" in line
        if row["variant"] == "plain":
            assert row["extra"] is None
            assert not row["errors"]
        else:
            ratios = sorted(mine / theirs - 1 for mine, theirs in zip(row["samples_ms"], plain, strict=True))
            assert row["extra"]["median"] == pytest.approx(ratios[1])
            assert f"| {ratios[1]:+.1%} (" in line
            assert 0 <= row["errors"]["gradient"] <= step_time.TOLERANCE["gradient"]
    assert "2 in all" in page
    assert "optimizer" in page
    assert (out / "step_time.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["step_time.json", "step_time.md", "step_time.png"]
    assert page in capsys.readouterr().out


def test_variants_can_be_left_out(step_time, tmp_path):
    assert step_time.main(f"{RUN} --variants plain --out {tmp_path}".split()) == 0
    (row,) = json.loads((tmp_path / "step_time.json").read_text())["rows"]
    assert row["variant"] == "plain"


def test_on_cuda_a_row_says_that_the_formulas_are_compiled(step_time):
    report = sys.modules["step_report"]
    row = {"variant": "formulas", "mode": "eager"}
    assert report.name({"hardware": {"arch": "sm_90a"}}, row) == "formulas, eager layers, compiled connections"
    assert report.name({"hardware": {"arch": "sm_90a"}}, row | {"mode": "compile"}) == "formulas, torch.compile"


def test_other_numbers_are_said_and_not_timed(step_time, step_model, tmp_path, monkeypatch, capsys):
    post = step_model.formulas_post
    monkeypatch.setattr(step_model, "formulas_post", lambda f, x, H_post, H_res: post(f, x, 1.1 * H_post, H_res))
    (tmp_path / "step_time.json").write_text("earlier")
    assert step_time.main(f"{RUN} --out {tmp_path}".split()) == 1
    said = capsys.readouterr().err
    assert "differs from the formulas, so nothing was timed: mhc, eager: loss by " in said
    assert "formulas, eager" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["step_time.json"]
    assert (tmp_path / "step_time.json").read_text() == "earlier"


def test_nan_is_a_difference(step_time):
    entrant = step_time.Entrant.__new__(step_time.Entrant)
    entrant.row = {"errors": {"loss": float("nan"), "gradient": 0.0}}
    assert entrant.differs


def test_a_variant_that_fails_is_a_row(step_time, tmp_path, monkeypatch, capsys):
    step = step_time.Entrant.step

    def failing(self):
        if self.row["variant"] == "formulas":
            raise RuntimeError("out of luck")
        return step(self)

    monkeypatch.setattr(step_time.Entrant, "step", failing)
    assert step_time.main(f"{RUN} --out {tmp_path}".split()) == 1
    plain, ours, formulas = json.loads((tmp_path / "step_time.json").read_text())["rows"]
    assert plain["ms"]
    assert ours["extra"]
    assert formulas["ms"] is formulas["extra"] is None
    assert "| formulas, eager | failed: RuntimeError: out of luck |" in capsys.readouterr().out


def interrupting(step_time: ModuleType, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C in the step of that number, counted from the first of the run."""
    step, calls = step_time.Entrant.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(step_time.Entrant, "step", interrupted)


def test_ctrl_c_keeps_whole_rounds(step_time, tmp_path, monkeypatch, capsys):
    interrupting(step_time, monkeypatch, 3 * step_time.WARM_UP + 3 + 3 * 2 - 1)  # in the second of the rounds that count
    assert step_time.main(f"{RUN} --out {tmp_path}".split()) == 130
    result = json.loads((tmp_path / "step_time.json").read_text())
    assert not result["complete"]
    assert result["rounds"] == 1
    assert all(len(row["samples_ms"]) == 1 for row in result["rows"])
    assert "**Interrupted" in (tmp_path / "step_time.md").read_text()
    assert "interrupted; what was measured was written" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["checking", "first round"])
def test_ctrl_c_before_a_round_leaves_the_earlier_result(step_time, tmp_path, monkeypatch, capsys, where):
    interrupting(step_time, monkeypatch, 2 if where == "checking" else 3 * step_time.WARM_UP + 3 + 2)
    (tmp_path / "step_time.md").write_text("earlier")
    assert step_time.main(f"{RUN} --out {tmp_path}".split()) == 130
    assert (tmp_path / "step_time.md").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1
    assert f"interrupted before anything was measured; {tmp_path} is as it was" in capsys.readouterr().err.replace("\n", "")


def test_without_matplotlib_there_is_no_old_picture_beside_new_numbers(step_time, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "step_time.png").write_bytes(b"old")
    assert step_time.main(f"{RUN} --variants plain,mhc --out {tmp_path}".split()) == 0
    assert not (tmp_path / "step_time.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "--device: got cpu, but the default sizes are a GPU's; wanted --tiny"),
        ("--tiny --layers 0", "--layers: got 0, wanted 1 or more"),
        ("--tiny --head-dim -1", "--head-dim: got -1"),
        ("--tiny --seq many", "--seq: invalid int value: 'many'"),
        ("--tiny --rounds 0", "--rounds: got 0"),
        ("--tiny --n 9", "--n: got 9, wanted 1..8 streams"),
        ("--tiny --variants mhc", "--variants: got mhc, wanted plain and"),
        ("--tiny --variants plain,hc", "--variants: got plain,hc"),
        ("--tiny --device tpu9", "--device: got tpu9"),
        ("--tiny --device meta", "--device: got meta, wanted cpu or cuda"),
        ("--tiny --device cuda:99", "--device: got cuda:99, but torch finds"),
    ],
)
def test_bad_options_are_named(step_time, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        step_time.main(["--device", "cpu", *arguments.split()])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_used_is_one_line(step_time, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, complaint in ((f"--out {tmp_path / 'file' / 'out'}", "--out"), (f"--profile nonsense --out {tmp_path}", "--profile: ")):
        assert step_time.main([*RUN.split(), *arguments.split()]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"step_time.py: {complaint}")
        assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", ["--variants plain,mhc,formulas", "--variants plain,mhc --compile"])
def test_on_the_gpu(step_time, tmp_path, arguments):
    assert step_time.main(f"--tiny --device cuda --rounds 3 {arguments} --out {tmp_path}".split()) == 0
    result = json.loads((tmp_path / "step_time.json").read_text())
    for row in result["rows"]:
        assert len(row["samples_ms"]) == 3
        assert row["peak_mib"] > 0
    assert result["hardware"]["name"] == torch.cuda.get_device_name()
