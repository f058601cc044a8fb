"""tuner/errors.py: one line, and the name that was meant."""

from tuner.errors import one_line, unknown


def test_a_long_trace_becomes_its_last_line():
    assert one_line(RuntimeError("Traceback\n  frame\nno available layout found\n\n")) == "RuntimeError: no available layout found"
    assert one_line(ValueError()) == "ValueError"


def test_a_compilers_complaint_is_found_beside_the_program_it_is_about():
    gcc = "Compilation Failed! ['g++', '-shared']\nx.cpp: In function 'f':\nx.cpp:3:1: error: 'y' was not declared\n y\nvoid f() {\n}\n"
    assert one_line(RuntimeError(gcc)) == "RuntimeError: x.cpp:3:1: error: 'y' was not declared"
    silent = "Compilation Failed! ['g++', '-shared']\n\nvoid f() {\n}\n"
    assert one_line(RuntimeError(silent)) == "RuntimeError: Compilation Failed! ['g++', '-shared']"
    nvcc = "void f() {\n}\nCompilation error:\nptxas fatal   : Memory allocation failure\n\nCommand: nvcc -O3 x.cu\n"
    assert one_line(RuntimeError(nvcc)) == "RuntimeError: ptxas fatal   : Memory allocation failure"


def test_names_far_from_any_are_not_guessed():
    assert "did you mean" not in str(unknown("kernel", "zzz", ["pre", "post_res"]))
    assert "did you mean 'pre'" in str(unknown("kernel", "pree", ["pre", "post_res"]))
