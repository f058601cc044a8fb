"""tuner/errors.py: one line, and the name that was meant."""

from tuner.errors import one_line, unknown


def test_a_long_trace_becomes_its_last_line():
    assert one_line(RuntimeError("Traceback\n  frame\nno available layout found\n\n")) == "RuntimeError: no available layout found"
    assert one_line(ValueError()) == "ValueError"


def test_names_far_from_any_are_not_guessed():
    assert "did you mean" not in str(unknown("kernel", "zzz", ["pre", "post_res"]))
    assert "did you mean 'pre'" in str(unknown("kernel", "pree", ["pre", "post_res"]))
