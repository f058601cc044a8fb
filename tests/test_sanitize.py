"""tests/sanitize.py launches what it says; on the CPU here, under compute-sanitizer on a GPU."""

import pytest

from tests import sanitize
from tl_kernels import KERNELS
from tl_kernels.cpu import available


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
def test_launches_the_programs_of_a_profile(capsys):
    assert sanitize.main(["post_res_project", "--profile", "cpu", "--device", "cpu", "--tokens", "1,3"]) == 0
    assert "ran 2 launches of 1 programs" in capsys.readouterr().out


@pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")
def test_launches_what_a_search_begins_with(capsys):
    kernel = KERNELS["post_res_project"]
    p = kernel.problem(4, 128)
    seeds = [cfg for cfg in kernel.seeds if kernel.invalid(p, cfg) is None]
    assert sanitize.main(["post_res_project", "--seeds", "--device", "cpu", "--C", "128", "--tokens", "3"]) == 0
    assert f"ran {len(seeds)} launches of {len(seeds)} programs" in capsys.readouterr().out


def test_nothing_to_launch_is_a_failure(capsys):
    assert sanitize.main(["pre", "--profile", "cpu", "--device", "cpu", "--C", "7"]) == 1


def test_an_unknown_kernel_is_named(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["nosuch"])
    assert "nosuch" in capsys.readouterr().err
