"""examples/train_lm.py: three residuals that differ in nothing else, and a command line that keeps what it has."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mhc
from tests.examples.conftest import import_example
from tl_kernels import NAMES

SHAPE = {"dim": 32, "layers": 2, "heads": 2, "seq": 16, "n": 3, "stream_dtype": torch.float32}
RUN = "--tiny --device cpu --steps 4 --batch 2 --seq 16 --dim 32 --heads 2 --n 4"


@pytest.fixture(scope="module")
def train_lm() -> ModuleType:
    return import_example("train_lm", "plot_losses")


@pytest.fixture(autouse=True)
def _backend(request):
    """The reference serves, for a new shape costs a minute of compiling; but in one test, at a shape of tests/mhc, and on a GPU what serves
    every test (tests/conftest.py).
    """
    kernels = request.node.name == "test_all_three_run_and_are_written" or request.node.get_closest_marker("gpu")
    with contextlib.nullcontext() if kernels else mhc.use_backend("reference"):
        yield


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for k in range(40):
        (folder / f"m{k:02}.py").write_text(f"value_{k} = {k}\n" * 40)
    return folder


def make(train_lm: ModuleType, residual: str):
    torch.manual_seed(0)
    return train_lm.GPT(residual, **SHAPE)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    return text[:, :-1], text[:, 1:]


def test_the_three_residuals_start_with_the_same_shared_weights(train_lm):
    models = {r: dict(make(train_lm, r).named_parameters()) for r in train_lm.RESIDUALS}
    for residual in ("hc", "mhc"):
        assert len(models[residual]) > len(models["plain"])
        for name, p in models["plain"].items():
            assert torch.equal(p, models[residual][name]), f"{residual}: {name}"


def test_hc_starts_as_the_plain_residual(train_lm):
    # equal up to the scale of the sum of streams, which the final norm takes out
    plain, hc = (make(train_lm, r)(*tokens()) for r in ("plain", "hc"))
    torch.testing.assert_close(hc, plain, rtol=1e-4, atol=0)


def test_mhc_starts_close_to_the_plain_residual_and_trains_its_coefficients(train_lm):
    model = make(train_lm, "mhc")
    loss = model(*tokens())
    torch.testing.assert_close(loss, make(train_lm, "plain")(*tokens()), rtol=2e-2, atol=0)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    assert all(connection.fn.grad.abs().sum() > 0 for connection in model.connections)


def test_hc_moves_away_from_its_start_when_its_weights_do(train_lm):
    hc = make(train_lm, "hc")
    before = hc(*tokens())
    with torch.no_grad():
        for connection in hc.connections:
            connection.W.normal_()
            connection.alpha.fill_(1.0)
    assert abs(hc(*tokens()) - before) > 1e-3


def test_attention_does_not_look_ahead(train_lm):
    attention = train_lm.Attention(32, 2, 16)
    u = torch.randn(1, 16, 32)
    changed = u.clone()
    changed[:, 9:] += 1
    assert torch.allclose(attention(u)[:, :9], attention(changed)[:, :9], atol=1e-6)
    assert not torch.allclose(attention(u)[:, 9:], attention(changed)[:, 9:], atol=1e-3)


def test_attention_knows_positions(train_lm):
    attention = train_lm.Attention(32, 2, 16)
    u = torch.randn(1, 16, 32)
    swapped = u[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(attention(u)[:, -1], attention(swapped)[:, -1], atol=1e-5)


def test_weight_decay_spares_norms_and_coefficients(train_lm):
    model = make(train_lm, "mhc")
    decay, keep = train_lm.parameter_groups(model)
    name_of = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] > 0 == keep["weight_decay"]
    assert len(decay["params"]) + len(keep["params"]) == len(name_of)
    assert {name_of[id(p)].split(".")[0] for p in decay["params"]} == {"layers", "embedding"}
    assert not any("norm" in name_of[id(p)] for p in decay["params"])
    assert {"connections.0.fn", "connections.0.base", "connections.0.scale", "head.hc_fn"} <= {name_of[id(p)] for p in keep["params"]}


def test_learning_rate_warms_up_and_ends_at_a_tenth(train_lm):
    rates = [train_lm.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_validation_files_are_the_last_of_the_sorted_ones(train_lm, sources):
    (sources / "site-packages").mkdir()
    (sources / "site-packages" / "zz.py").write_text("not part of the library\n" * 100)
    corpus = train_lm.Corpus(sources, torch.device("cpu"))
    assert (corpus.files, corpus.train_files) == (40, 38)
    assert bytes(corpus.val.tolist()) == (sources / "m38.py").read_bytes() + (sources / "m39.py").read_bytes()
    assert b"value_38" not in bytes(corpus.train.tolist())


def test_batches_depend_on_the_seed_alone(train_lm, sources):
    corpus = train_lm.Corpus(sources, torch.device("cpu"))

    def first(seed):
        torch.rand(3)  # the global generator must not matter
        return next(corpus.batches("train", 2, 16, seed))

    one, same, other = first(5), first(5), first(6)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[0][:, 1:], one[1][:, :-1])


def test_all_three_run_and_are_written(train_lm, sources, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert train_lm.main(f"--residual all {RUN} --data {sources} --out {out}".split()) == 0
    result = json.loads((out / "losses.json").read_text())
    assert [run["residual"] for run in result["runs"]] == ["plain", "hc", "mhc"]
    for run in result["runs"]:
        assert len(run["loss"]) == len(run["grad_norm"]) == 4
        assert [step for step, _ in run["val"]] == [0, 1, 2, 3, 4]
        assert all(math.isfinite(v) for v in run["loss"] + run["grad_norm"])
        assert run["val"][-1][1] < run["val"][0][1]
        assert run["tokens_per_s"] == pytest.approx(2 * 16 / run["median_step_ms"] * 1e3)
    assert result["hardware"]
    assert result["versions"]["torch"] == torch.__version__
    assert "--residual all" in result["command"]
    assert sum(result["profile"]["origins"].values()) == len(NAMES)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "tuned profile: " in capsys.readouterr().out


def test_same_seed_gives_the_same_losses(train_lm, sources, tmp_path):
    losses = []
    for k in range(2):
        train_lm.main(f"--residual hc {RUN} --data {sources} --out {tmp_path / str(k)}".split())
        losses.append(json.loads((tmp_path / str(k) / "losses.json").read_text())["runs"][0]["loss"])
    assert losses[0] == losses[1]


def test_bfloat16_streams_on_the_cpu(train_lm, sources, tmp_path):
    assert train_lm.main(f"--residual mhc --dtype bfloat16 {RUN} --data {sources} --out {tmp_path}".split()) == 0
    result = json.loads((tmp_path / "losses.json").read_text())
    assert result["stream_dtype"] == "bfloat16"
    assert all(math.isfinite(v) for v in result["runs"][0]["loss"])


def test_ctrl_c_keeps_what_there_is(train_lm, sources, tmp_path, monkeypatch):
    clip, calls = train_lm.nn.utils.clip_grad_norm_, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(train_lm.nn.utils, "clip_grad_norm_", interrupt)
    assert train_lm.main(f"--residual all {RUN} --data {sources} --out {tmp_path}".split()) == 130
    (run,) = json.loads((tmp_path / "losses.json").read_text())["runs"]
    assert run["interrupted"]
    assert len(run["loss"]) == len(run["grad_norm"]) == 2
    assert (tmp_path / "losses.png").is_file()


def test_without_matplotlib_there_are_numbers_and_no_picture(train_lm, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plot_losses", None)
    assert train_lm.main(f"--residual plain {RUN} --data {sources} --out {tmp_path}".split()) == 0
    assert json.loads((tmp_path / "losses.json").read_text())["runs"][0]["loss"]
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("files", [0, 1])
def test_missing_data_is_one_line(train_lm, tmp_path, capsys, files):
    folder = tmp_path / "empty"
    folder.mkdir()
    for k in range(files):
        (folder / f"{k}.py").write_text("x = 1\n" * 100)
    assert train_lm.main(f"--residual plain {RUN} --data {folder} --out {tmp_path / 'out'}".split()) == 1
    assert f"--data {folder}: {files} .py files there" in capsys.readouterr().out


def test_too_little_data_names_the_part(train_lm, tmp_path, capsys):
    for k in range(2):
        (tmp_path / f"{k}.py").write_text("x\n" * (500 if k == 0 else 3))
    assert train_lm.main(f"--residual plain {RUN} --data {tmp_path} --out {tmp_path / 'out'}".split()) == 1
    assert "the val part has 6 bytes, wanted more than --seq 16 + 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--dim 30 --heads 4", "--dim: got 30"),
        ("--steps 0", "--steps: got 0"),
        ("--residual no", "--residual"),
        ("--n 9", "--n: got 9, wanted 1..8 streams"),
        ("--device tpu9", "--device: got tpu9"),
        ("--device meta", "--device: got meta, wanted cpu or cuda"),
    ],
)
def test_bad_arguments(train_lm, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        train_lm.main(arguments.split())
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_profile_that_is_none_is_one_line(train_lm, sources, tmp_path, capsys):
    assert train_lm.main(f"--residual mhc --profile nonsense {RUN} --data {sources} --out {tmp_path / 'out'}".split()) == 1
    assert "nonsense" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_smoothing_keeps_a_line_straight(train_lm):
    plot_losses = sys.modules["plot_losses"]
    line = [float(k) for k in range(200)]
    assert plot_losses.smooth(line) == pytest.approx(line)
    noisy = [v + (-1) ** k for k, v in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(plot_losses.smooth(noisy)[20:-20], line[20:-20], strict=True)) < 0.2


def test_plot_can_be_drawn_again(train_lm, sources, tmp_path, capsys):
    train_lm.main(f"--residual plain {RUN} --data {sources} --out {tmp_path}".split())
    assert sys.modules["plot_losses"].main([str(tmp_path / "losses.json"), str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_bfloat16_streams_train_on_the_gpu(train_lm, sources, tmp_path, residual):
    arguments = f"--residual {residual} --tiny --device cuda --steps 30 --batch 4 --seq 32 --data {sources} --out {tmp_path}"
    assert train_lm.main(arguments.split()) == 0
    result = json.loads((tmp_path / "losses.json").read_text())
    (run,) = result["runs"]
    assert result["stream_dtype"] == "bfloat16"
    assert run["loss"][-1] < run["loss"][0] - 1
    assert run["peak_memory_mib"] > 0
