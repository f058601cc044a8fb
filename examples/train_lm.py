"""Train a small byte-level GPT on the Python standard library's own sources, with one of three residual connections.

    python examples/train_lm.py --residual all            # plain, hc and mhc, one after the other: 400 steps take 12 to 29 s on an H100
    python examples/train_lm.py --residual mhc --tiny     # under a minute on a 2-core CPU, compilation of the kernels included

``plain`` is x + f(x). ``hc`` is Hyper-Connections without a constraint (arXiv 2409.19606), in plain PyTorch below. ``mhc`` is this
project's module with its tuned kernels: look for ``mhc.`` to see all that a model has to change. Shared weights, data and data order are
the same for the three. Writes losses.json and losses.png into ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import mhc
from mhc.profile import active_profile, choose, device_name
from tl_kernels import KERNELS
from tl_kernels.spec import MAX_N

RESIDUALS = ("plain", "hc", "mhc")
VOCABULARY = 256
TINY = {"steps": 60, "batch": 8, "seq": 64, "dim": 64, "layers": 2, "heads": 4, "lr": 3e-3}
DEFAULTS = {"steps": 400, "batch": 32, "seq": 512, "dim": 512, "layers": 8, "heads": 8, "lr": 1e-3}

# Shapes: B sequences, S bytes of context, n streams, C channels; the streams x are [B,S,n,C], a layer sees u [B,S,C].


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype))


class Attention(nn.Module):
    """Pre-norm causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int, seq: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        half = dim // heads // 2
        angle = torch.outer(torch.arange(seq).float(), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, t: Tensor) -> Tensor:
        cos, sin = self.cos[: t.shape[-2]].to(t.dtype), self.sin[: t.shape[-2]].to(t.dtype)
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(u)).unflatten(-1, (3 * self.heads, -1)).transpose(-2, -3).chunk(3, dim=-3)
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(a.transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    """Pre-norm GELU MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(u))))


class HyperConnections(nn.Module):
    """Dynamic Hyper-Connections: each coefficient is a static value plus alpha * tanh(norm(x) @ W). Nothing bounds H_res."""

    def __init__(self, dim: int, n: int, index: int) -> None:
        super().__init__()
        self.n = n
        self.norm = RMSNorm(dim)
        self.W = nn.Parameter(torch.zeros(dim, n + 2))
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        # with these, every stream starts as the plain residual stream
        self.H_pre = nn.Parameter(F.one_hot(torch.tensor(index % n), n).float())
        self.H_post = nn.Parameter(torch.ones(n))
        self.H_res = nn.Parameter(torch.eye(n))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # coefficients and mixing in fp32
            x32 = x.float()
            pre, post, res = torch.tanh(self.norm(x32) @ self.W).split([1, 1, self.n], dim=-1)
            H_pre = self.H_pre + self.alpha[0] * pre.squeeze(-1)
            H_post = self.H_post + self.alpha[1] * post.squeeze(-1)
            H_res = self.H_res + self.alpha[2] * res.transpose(-1, -2)  # row i: the mixture that becomes stream i
            u = torch.einsum("...j,...jc->...c", H_pre, x32).to(x.dtype)
        f = layer(u)
        with torch.autocast(x.device.type, enabled=False):
            y = H_res @ x32 + H_post[..., None] * f.float()[..., None, :]
            return y.to(x.dtype)


class GPT(nn.Module):
    """``residual``: plain, hc or mhc. Everything they share is made first, so one seed gives the three the same shared weights."""

    def __init__(self, residual: str, *, dim: int, layers: int, heads: int, seq: int, n: int, stream_dtype: torch.dtype) -> None:
        super().__init__()
        self.residual, self.n, self.stream_dtype = residual, n, stream_dtype
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(m for _ in range(layers) for m in (Attention(dim, heads, seq), MLP(dim)))
        self.norm = RMSNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:
            for name, weight in layer.named_parameters():
                if name in ("out.weight", "down.weight"):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))
                elif weight.ndim == 2:
                    nn.init.normal_(weight, std=0.02)
        if residual == "hc":
            self.connections = nn.ModuleList(HyperConnections(dim, n, i) for i in range(2 * layers))
        elif residual == "mhc":
            self.connections = nn.ModuleList(mhc.HyperConnection(dim, n=n) for _ in range(2 * layers))
            self.head = mhc.HyperHead(dim, n=n)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte; ``tokens`` and ``targets`` are int64 [B,S]."""
        h = self.embedding(tokens).to(self.stream_dtype)
        if self.residual == "plain":
            for layer in self.layers:
                h = h + layer(h).to(h.dtype)
        elif self.residual == "hc":
            x = h.unsqueeze(-2).expand(*h.shape[:-1], self.n, h.shape[-1])
            for layer, connection in zip(self.layers, self.connections, strict=True):
                x = connection(x, layer)
            h = x.float().sum(-2).to(h.dtype)
        else:
            x = mhc.expand(h, self.n)
            for layer, hc in zip(self.layers, self.connections, strict=True):
                u, ctx = hc.pre(x)
                x = hc.post(layer(u).to(u.dtype), ctx)
            h = self.head(x)
        logits = F.linear(self.norm(h), self.embedding.weight.to(h.dtype))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Corpus:
    """The ``*.py`` files below a folder in sorted order, as bytes; the last 5% of the files are the validation part."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        files = sorted(
            (f for f in folder.rglob("*.py") if not skipped & set(f.relative_to(folder).parts)),
            key=lambda f: f.relative_to(folder).as_posix(),
        )
        cut = len(files) - max(1, len(files) // 20)
        if cut < 1:
            raise FileNotFoundError(
                f"--data {folder}: {len(files)} .py files there, wanted a folder of Python sources (two files at least)"
            )
        self.folder, self.files, self.train_files = folder, len(files), cut
        self.train, self.val = (self._read(part, device) for part in (files[:cut], files[cut:]))

    @staticmethod
    def _read(files: list[Path], device: torch.device) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).to(device)

    def batches(self, part: str, batch: int, seq: int, seed: int):
        """Endless (tokens, targets), each int64 [batch, seq], at offsets that depend on ``seed`` alone."""
        data: Tensor = getattr(self, part)
        if len(data) <= seq + 1:
            raise ValueError(f"--data {self.folder}: the {part} part has {len(data)} bytes, wanted more than --seq {seq} + 1")
        draw, window = torch.Generator().manual_seed(seed), torch.arange(seq + 1, device=data.device)
        while True:
            start = torch.randint(len(data) - seq - 1, (batch, 1), generator=draw).to(data.device, non_blocking=True)
            chunk = data[start + window].long()
            yield chunk[:, :-1], chunk[:, 1:]


@dataclass
class Log:
    """What one run measured; one entry a step, except ``val`` ([step, loss] pairs) and ``step_ms`` (one a reporting interval)."""

    residual: str
    parameters: int
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    val: list[list[float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    median_step_ms: float = math.nan
    tokens_per_s: float = math.nan
    peak_memory_mib: float | None = None
    interrupted: bool = False


def parameter_groups(model: GPT) -> list[dict[str, Any]]:
    """Weight decay for the matrices of the GPT; none for norms and for the coefficients of the residual connections."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        (decay if p.ndim == 2 and name.startswith(("layers.", "embedding.")) else keep).append(p)
    return [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_dtype(device: torch.device, name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype) if dtype is torch.bfloat16 else contextlib.nullcontext()


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Mean loss over the same 8 validation batches every time."""
    batches = corpus.batches("val", args.batch, args.seq, seed=1)
    with autocast(args.device, dtype):
        return torch.stack([model(*next(batches)) for _ in range(8)]).mean().item()


def train(residual: str, corpus: Corpus, args: argparse.Namespace, console: Console) -> Log:
    """One run from scratch. Ctrl-C ends it early with ``interrupted`` set and everything so far in the log."""
    device, dtype = args.device, stream_dtype(args.device, args.dtype)
    torch.manual_seed(args.seed)
    gpt = GPT(residual, dim=args.dim, layers=args.layers, heads=args.heads, seq=args.seq, n=args.n, stream_dtype=dtype).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(gpt), lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    model = torch.compile(gpt) if args.compile else gpt
    log = Log(residual, sum(p.numel() for p in gpt.parameters()))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = corpus.batches("train", args.batch, args.seq, args.seed)
    interval, eval_every = max(1, min(10, args.steps // 10)), max(1, args.steps // 10)
    losses: list[Tensor] = []
    norms: list[Tensor] = []

    def collect() -> None:
        """Read the interval's losses back: the only place where the CPU waits for the GPU."""
        if losses:
            log.loss += torch.stack(losses).tolist()
            log.grad_norm += torch.stack(norms).tolist()
            losses.clear()
            norms.clear()

    columns = (TextColumn(f"{residual:>5}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(residual, total=args.steps, state="")
        try:
            log.val.append([0, validate(model, corpus, args, dtype)])
            synchronize(device)
            since, start = 0, time.perf_counter()
            for step in range(args.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.steps, args.lr)
                with autocast(device, dtype):
                    loss = model(*next(batches))
                loss.backward()
                norm = nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                norms.append(norm.detach())
                since += 1
                if since == interval or step + 1 == args.steps:
                    collect()
                    log.step_ms.append((time.perf_counter() - start) / since * 1e3)
                    if (step + 1) % eval_every == 0 or step + 1 == args.steps:
                        log.val.append([step + 1, validate(model, corpus, args, dtype)])
                    state = f"loss {log.loss[-1]:.3f}  val {log.val[-1][1]:.3f}  {log.step_ms[-1]:.0f} ms"
                    progress.update(task, completed=step + 1, state=state)
                    synchronize(device)
                    since, start = 0, time.perf_counter()
        except KeyboardInterrupt:
            log.interrupted = True
            pairs = min(len(losses), len(norms))
            del losses[pairs:], norms[pairs:]
            collect()
    timed = sorted(log.step_ms[1:] or log.step_ms)  # the first interval compiles and warms up
    if timed:
        log.median_step_ms = timed[len(timed) // 2]
        log.tokens_per_s = args.batch * args.seq / log.median_step_ms * 1e3
    if device.type == "cuda":
        log.peak_memory_mib = torch.cuda.max_memory_allocated(device) / 2**20
    return log


def describe_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Load ``--profile`` if one was given and count how many of the kernels the active profile serves at this shape."""
    if args.profile:
        mhc.load_profile(args.profile)
    active = active_profile(args.device)
    name = f"tuned on {active.provenance.gpu}, {active.provenance.date}" if active else "none"
    dtype = str(stream_dtype(args.device, args.dtype)).removeprefix("torch.")
    choices = {k: choose(k, KERNELS[k].problem(args.n, args.dim, dtype), args.batch * args.seq, args.device) for k in KERNELS}
    origins = Counter(c.origin for c in choices.values())
    impls = Counter(c.impl for c in choices.values())
    return {"name": name, "kernels": len(choices), "origins": dict(origins), "impls": dict(impls)}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(out: Path, runs: list[Log], corpus: Corpus, args: argparse.Namespace, profile: dict[str, Any] | None, command: str) -> None:
    """losses.json and, where matplotlib is installed, losses.png in ``out``."""
    options = {k: str(v) if isinstance(v, (Path, torch.device)) else v for k, v in vars(args).items()}
    result = {
        "hardware": device_name(args.device),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "tilelang", "triton")},
            "cuda": torch.version.cuda,
        },
        "command": command,
        "options": options,
        "stream_dtype": str(stream_dtype(args.device, args.dtype)).removeprefix("torch."),
        "profile": profile,
        "data": {"files": corpus.files, "train_files": corpus.train_files, "train_bytes": len(corpus.train), "val_bytes": len(corpus.val)},
        "runs": [vars(log) for log in runs],
    }
    (out / "losses.json").write_text(json.dumps(result, indent=1) + "\n")
    with contextlib.suppress(ModuleNotFoundError):
        from plot_losses import plot

        plot(result, out / "losses.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residual", choices=(*RESIDUALS, "all"), default="mhc")
    for name, default in DEFAULTS.items():
        text = f"default {default}, with --tiny {TINY[name]}"
        parser.add_argument(f"--{name}", type=type(default), help=text)
    parser.add_argument("--n", type=int, default=4, help="streams, default 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="sizes for a 2-core CPU and a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/train_lm"), help="folder for losses.json and losses.png, default %(default)s"
    )
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of .py files, default %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="streams; auto: bfloat16 on CUDA, else float32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profile", help="tuned profile: a YAML path or a packaged name; default: found by MHC_PROFILE or the device's name"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args(argv)
    for name, value in (TINY if args.tiny else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch", "seq", "dim", "layers", "heads", "n"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, wanted 1 or more")
    if args.dim % (2 * args.heads):
        parser.error(f"--dim: got {args.dim}, wanted a multiple of 2 * --heads = {2 * args.heads} (rotary pairs)")
    if args.n > MAX_N:
        parser.error(f"--n: got {args.n}, wanted 1..{MAX_N} streams")
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: got {args.device}: {error}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {args.device}, wanted cpu or cuda, which the kernels run on")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no CUDA GPU; wanted cpu here")
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 no usable data or profile or an output that cannot be written, 130 after Ctrl-C."""
    args = parse(argv)
    if args.tiny and args.device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small gain nothing from more, and on a busy machine threads that wait for each other lose
    console = Console()
    command = shlex.join(["python", "examples/train_lm.py", *(sys.argv[1:] if argv is None else argv)])
    names = RESIDUALS if args.residual == "all" else (args.residual,)
    try:
        profile = describe_profile(args) if "mhc" in names else None
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "losses.png").unlink(missing_ok=True)  # never an old picture beside new numbers
        corpus = Corpus(args.data, args.device)
        for part in ("train", "val"):
            next(corpus.batches(part, args.batch, args.seq, args.seed))
    except (OSError, ValueError) as error:
        console.print(f"[red]{error}", soft_wrap=True, highlight=False)
        return 1
    console.print(f"{device_name(args.device)}: {', '.join(names)}; {len(corpus.train) / 1e6:.1f} MB of Python to train on, "
                  f"{len(corpus.val) / 1e6:.1f} MB to validate", soft_wrap=True, highlight=False)  # fmt: skip
    if profile:
        served = profile["kernels"] - profile["origins"].get("default", 0)
        how = f"serves {served} of {profile['kernels']} kernels {profile['origins']}, run by {profile['impls']}"
        console.print(f"tuned profile: {profile['name']}; {how}", soft_wrap=True, highlight=False)
    runs: list[Log] = []
    for name in names:
        runs.append(train(name, corpus, args, console))
        log = runs[-1]
        save(args.out, runs, corpus, args, profile, command)
        console.print(f"{name:>5}: {len(log.loss)} steps, train {log.loss[-1] if log.loss else math.nan:.4f}, "
                      f"val {log.val[-1][1] if log.val else math.nan:.4f} nats/byte, {log.median_step_ms:.1f} ms/step, "
                      f"{log.tokens_per_s:,.0f} bytes/s", soft_wrap=True, highlight=False)  # fmt: skip
        if log.interrupted:
            console.print(f"interrupted; what there is is in {args.out}", soft_wrap=True, highlight=False)
            return 130
    picture = args.out / "losses.png"
    and_picture = f" and {picture}" if picture.exists() else "; no picture: matplotlib is not installed (pip install matplotlib)"
    console.print(f"wrote {args.out / 'losses.json'}{and_picture}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
