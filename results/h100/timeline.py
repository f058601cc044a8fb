"""Where an iteration of the whole passes goes: clocks of one thread of each role, as in timeline.txt. Run from the top of the checkout:

    python results/h100/timeline.py                  (compiles its variants first, in parallel)
    python results/h100/timeline.py --compile-only   (needs no GPU)

It works on a copy of tl_kernels with marks in it and stops where the text to be marked has changed. A clock is read by thread 0 of a role.
One that stands behind a barrier may be read before it: a span that begins there includes the wait. Spans in cycles: mean (10th, 90th
percentile).
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
BLOCKS, ITERATIONS, MARKS = 140, 160, 16
KNOBS = ("block_T", "block_C", "groups", "threads", "ahead", "levels", "phi", "slack")
VARIANTS = (
    ("project_pre", 2560, 8192, "32 128 6 256 1 1 shared 0"),
    ("project_pre", 2560, 8192, "32 128 6 256 2 1 registers 1"),
    ("project_pre", 4096, 8192, "16 128 4 256 3 2 registers 1"),
    ("project_pre", 7168, 4096, "16 128 2 256 3 2 registers 1"),
    ("project_pre", 7168, 4096, "32 128 2 256 1 2 registers 0"),
    ("post_res_project_pre", 2560, 8192, "32 128 6 256 1 1 shared 0"),
    ("post_res_project_pre", 2560, 8192, "32 128 6 256 1 1 registers 1"),
    ("post_res_project_pre", 7168, 4096, "16 128 2 256 2 2 shared 1"),
)
#: Marks: 0 to 5 and 13 the main role's, 6 to 8 the product's, 9 to 12 the sums'.
WAITED, TOPPED, U, ASKED, WORKED, P_TOP, P_DONE, P_END, S_TOP, S_WORDS, S_END, H_PRE = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13

MARK = f"""DBG = {BLOCKS * ITERATIONS * MARKS}


@T.macro
def mark(scratch, at, i, k):
    scratch[at + i * {MARKS} + k] = T.call_extern("uint32", "clock")


def base_of(p, cfg, s, g):
    return scratch_of(p, cfg) - DBG + (g * group_of(p, cfg) + s) * {ITERATIONS * MARKS}


"""


def replace(text: str, old: str, new: str) -> str:
    assert old in text, f"changed since: {old!r}"
    return text.replace(old, new)


def after(text: str, line: str, who: str, mark: int, which: int | None = None) -> str:
    """A mark behind every line that begins so, or behind one of them, by one thread."""
    out, seen = [], 0
    for one in text.split("\n"):
        out.append(one)
        if one.strip().startswith(line):
            seen += 1
            if which in (None, seen):
                indent = one[: len(one) - len(one.lstrip())]
                out += [f"{indent}if tx == {who}:", f"{indent}    mark(scratch, dbg, i, {mark})"]
    assert seen, f"changed since: {line!r}"
    return "\n".join(out)


def marked(folder: Path) -> None:
    """Put marks into a copy of tl_kernels."""
    whole = (folder / "whole.py").read_text()
    whole = replace(whole, "p.M + 1, ring_of(cfg))\n\n\ndef u_first", "p.M + 1, ring_of(cfg)) + DBG\n\n\ndef u_first")
    whole = replace(whole, "def scratch_of(p, cfg):", MARK + "def scratch_of(p, cfg):")
    for line, who, number in (
        ("T.gemm(phi_b, x_s[(i - 1) % buffers, :, :], z_NT, transpose_B=True, clear_accum=True)", "threads", P_DONE),
        ("add_up(scratch, g, s, number(epoch, i - summed), words, old, total)", "threads + ROLE", S_WORDS),
        ("put_pre(i % 2, total_s, pre_s, alpha, b)", "threads + ROLE", S_WORDS),
    ):
        whole = after(whole, line, who, number)
    whole = whole.replace("if tx == ", "if T.get_thread_binding() == ").replace(
        "mark(scratch, dbg, i", "mark(scratch, base_of(p, cfg, s, g), i"
    )
    (folder / "whole.py").write_text(whole)
    for name in ("together", "apart"):
        text = (folder / f"{name}.py").read_text()
        text = replace(text, "from tl_kernels.whole import ", "from tl_kernels.whole import base_of, mark, ")
        text = replace(text, "        mine = T.max(", "        dbg = base_of(p, cfg, s, g)\n        mine = T.max(")
        text = after(text, "t0 = (i * groups + g) * bt", "0", 0)
        text = after(text, "T.fence_proxy_async()", "0", WAITED)
        if name == "apart":
            for who, number, which in (("0", TOPPED, 1), ("threads", P_TOP, 2), ("threads + ROLE", S_TOP, 3)):
                text = after(text, "T.sync_threads(TOP, everyone)", who, number, which)
        else:
            for who, number in (("threads + ROLE", S_TOP), ("threads", P_TOP), ("0", TOPPED)):
                text = after(text, "T.sync_threads()", who, number, 1)
            text = after(text, "T.sync_threads(PRE", "0", H_PRE)
        calls = (("give_u(i,", "0", U), ("load(i + ahead", "0", ASKED), ("work(i,", "0", WORKED), ("product(i,", "threads", P_END))
        for line, who, number in (*calls, ("sums(i,", "threads + ROLE", S_END)):
            text = after(text, line, who, number)
        (folder / f"{name}.py").write_text(text)


def launcher(variant):
    from tl_kernels import KERNELS
    from tl_kernels.launch import get_launcher

    name, C, _, values = variant
    cfg = dict(zip(KNOBS, (int(v) if v.isdigit() else v for v in values.split()), strict=True))
    kernel = KERNELS[name]
    p = kernel.problem(4, C)
    return kernel, p, cfg, get_launcher(kernel, p, cfg, "sm_90a")


def compiled(folder, variant):
    sys.path.insert(0, folder)
    try:
        launcher(variant)
    except Exception as error:
        return f"{variant}: {type(error).__name__}: {str(error)[:300]}"


def show(variant) -> None:
    import numpy as np
    import torch

    from tl_kernels import scratch
    from tuner.inputs import make_inputs

    name, C, T, values = variant
    kernel, p, cfg, run = launcher(variant)
    inputs = make_inputs(kernel, p, T, 0, "cuda")
    flush, events = torch.empty(64 << 20, dtype=torch.int32, device="cuda"), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(7):
        flush.sum()
        events[0].record()
        run(*inputs)
        events[1].record()
        torch.cuda.synchronize()
        times.append(1e3 * events[0].elapsed_time(events[1]))
    words = next(t for key, (_, t) in scratch._KEPT.items() if key[0] == id(run))
    blocks = -(-C // cfg["block_C"]) * cfg["groups"]
    marks = words[-BLOCKS * ITERATIONS * MARKS :].view(torch.int32).cpu().numpy().reshape(BLOCKS, ITERATIONS, MARKS)[:blocks]
    tiles = -(-T // (cfg["block_T"] * cfg["groups"]))
    marks = marks[:, 10 : tiles - 4]  # full of work, and written by every launch
    first, now, then = cfg["levels"] == 2 or cfg["phi"] == "registers", marks[:, :-1], marks[:, 1:]

    def span(a, b):
        cycles = (b - a).astype(np.int32)  # wraps as the clock does
        return f"{cycles.mean():.0f} ({np.percentile(cycles, 10):.0f}, {np.percentile(cycles, 90):.0f})"

    def steps(what, *named):
        return f"  {what}: " + ", ".join(f"{label} {span(a, b)}" for label, a, b in named)

    at = [now[..., k] for k in range(MARKS)]
    following = then[..., TOPPED]
    print(f"\n{name} C={C} T={T} {values}: {sorted(times)[3]:.1f} us, iterations of {span(at[TOPPED], following)}")
    if first:
        print(steps("main", ("u", at[TOPPED], at[U]), ("ask", at[U], at[ASKED]), ("work", at[ASKED], at[WORKED])))
    else:
        named = (("ask", at[TOPPED], at[ASKED]), ("work", at[ASKED], at[WORKED]), ("H_pre and u", at[WORKED], at[U]))
        print(steps("main", *named))
    print(steps("product", ("multiply", at[P_TOP], at[P_DONE]), ("publish", at[P_DONE], at[P_END])))
    print(steps("sums", ("words", at[S_TOP], at[S_WORDS]), ("the rest", at[S_WORDS], at[S_END])))
    last = np.stack([(following - end).astype(np.int32) for end in (at[WORKED if first else U], at[P_END], at[S_END])]).argmin(0)
    print(
        "  last to end: " + ", ".join(f"{role} {(last == k).mean():.0%}" for k, role in enumerate(("main", "product", "sums"))), flush=True
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for package in ("tl_kernels", "tuner", "mhc", "configs"):
            shutil.copytree(TOP / package, Path(folder) / package)
        marked(Path(folder) / "tl_kernels")
        sys.path.insert(0, folder)
        with multiprocessing.get_context("spawn").Pool() as pool:
            for error in pool.starmap(compiled, [(folder, variant) for variant in VARIANTS], chunksize=1):
                if error:
                    print(error)
        if "--compile-only" not in sys.argv:
            for variant in VARIANTS:
                show(variant)


if __name__ == "__main__":
    main()
