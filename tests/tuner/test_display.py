"""tuner/display.py: the table and the plain lines."""

import io

import pytest
from rich.console import Console

from mhc.schema import Entry
from tuner.display import RUNGS, Display, duration, funnel_line, gain_text, microseconds, percent, result_table

ENTRY = Entry(
    kernel="post_res_bwd",
    n=4,
    C=2560,
    dtype="bfloat16",
    tokens=8192,
    config={"block_C": 640},
    time_us=136.04,
    time_ci_us=(135.9, 136.2),
    gbps=2771.0,
    copy_share=0.93,
    default_us=1500.2,
    verdict="win",
    error={"y": 1e-3},
    source_hash="0" * 16,
)


def printed(show):
    stream = io.StringIO()
    show(Console(file=stream, width=120))
    return stream.getvalue()


def test_the_table_shows_shape_times_rate_share_and_verdict():
    text = printed(lambda console: console.print(result_table([ENTRY], "H100")))
    for word in ("post_res_bwd", "2560", "bf16", "8192", "1500", "136.0", "2771.0", "93%", "win"):
        assert word in text, word


def test_without_a_terminal_a_finished_study_is_one_plain_line():
    def show(console):
        with Display(console) as display:
            display.progress("x", 1, 2, None, 0, 1, None, "")
            display.finished("post_res [odd] T=8192", ENTRY, 16, 16, 1, 2, 75.0)

    text = printed(show)
    assert text.count("\n") == 1
    assert "[1/2] post_res [odd] T=8192: 1500 -> 136.0 us, 2771.0 GB/s (93% of copy), win; 16 trials (16 new), ~1:15 left" in text
    assert "\x1b" not in text


def test_small_numbers_are_readable():
    assert duration(75.4) == "1:15"
    assert duration(-3) == "0:00"
    assert microseconds(None) == "-"
    assert microseconds(3.14159) == "3.1"


def test_entries_that_differ_in_C_only_share_a_row():
    twin = ENTRY.model_copy(update={"C": 4096})
    text = printed(lambda console: console.print(result_table([ENTRY, twin], "H100")))
    assert text.count("post_res_bwd") == 1
    assert "any" in text


LONG = ENTRY.model_copy(
    update={"kernel": "post_res_coefficients_bwd", "tokens": 16384, "default_us": 123456.0, "gbps": 14771.3, "copy_share": 1.12}
)


def test_on_80_columns_nothing_of_a_row_is_lost():
    rows = [ENTRY, LONG.model_copy(update={"gain_ci": (0.9081, 0.9101)}), LONG.model_copy(update={"impl": "reference", "tokens": 1})]
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table(rows, "H100"))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in stream.getvalue()
    for text in ("8192x4x2560", "16384x4x2560", "bf16", "123456", "136.0", "14771.3", "112%", "win 99.9%", "reference"):
        assert any(text in line for line in lines), text


def test_in_a_pipe_a_row_is_a_line():
    said = printed(lambda console: console.print(result_table([SURE, LONG], "H100"))).splitlines()
    assert len(said) == 1 + 2 + 2
    assert said[-1].split()[:4] == ["post_res_coefficients_bwd", "16384x4x2560", "bf16", "123456"]


SURE = ENTRY.model_copy(update={"gain_ci": (0.9081, 0.9101)})


def test_the_table_shows_how_sure_a_gain_is():
    text = printed(lambda console: console.print(result_table([SURE], "H100")))
    assert "90.9% (90.8% to 91.0%)" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "90.9%"),
        ({"gain_ci": (0.9, 0.92)}, "90.9% (90.0% to 92.0%)"),
        ({"verdict": "tie", "time_us": 1500.2, "gain_ci": (-0.002, 0.008)}, "-0.2% to 0.8%"),
        ({"verdict": "default", "time_us": 1500.2}, "-"),
        ({"impl": "reference", "gain_ci": (0.1, 0.2)}, "90.9%"),  # the interval is not PyTorch's
    ],
)
def test_the_gain_of_each_verdict(changes, text):
    assert gain_text(ENTRY.model_copy(update=changes)) == text


@pytest.mark.parametrize(("share", "text"), [(0.0963, "9.6%"), (-0.0004, "-0.04%"), (0.00001, "0%"), (-0.00001, "0%"), (0, "0%")])
def test_shares_are_readable(share, text):
    assert percent(share) == text


def test_a_win_says_by_how_much():
    def show(console):
        with Display(console) as display:
            display.finished("post_res", SURE.model_copy(update={"gain_ci": (0.9, 0.92)}), 16, 16, 1, 2, None)

    assert "(93% of copy), win by 90.9% (90.0% to 92.0%); 16 trials" in printed(show)


def test_the_funnel_is_one_line_in_the_order_of_the_ladder():
    counts = {"ok": 12, "slow": 4, "shared": 3, "space": 432, "constraint": 120, "crash": 0, "new_rung": 1}
    line = (
        "432 configurations: 120 ruled out by the kernel's constraints, 3 with too much shared memory, 4 cut short as slow,"
        " 12 timed in full, 1 new_rung, 292 not tried"
    )
    assert funnel_line(counts) == line
    assert funnel_line({}) == "0 configurations: none tried"
    assert len(set(RUNGS.values())) == len(RUNGS)
