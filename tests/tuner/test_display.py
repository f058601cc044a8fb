"""tuner/display.py: the table and the plain lines."""

import io

from rich.console import Console

from mhc.schema import Entry
from tuner.display import Display, duration, microseconds, result_table

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
