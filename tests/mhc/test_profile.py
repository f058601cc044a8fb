"""The profile loader: one configuration out, and a report for everything that is not as it should be."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc import profile as mp
from mhc.profile import Choice, ProfileError, choose, load_profile, profile_name, read_profile, save_profile
from tests.mhc.profiles import DEFAULT, entry, load, profile
from tl_kernels.spec import Problem

pytestmark = pytest.mark.usefixtures("machine")

CPU = torch.device("cpu")
H100 = torch.device("cuda", 0)
SHAPE = Problem(4, 2560)


# names


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000-blackwell"),
        ("AMD EPYC 9654 96-Core Processor", "cpu"),
        ("Intel(R) Xeon(R) Platinum 8480+", "cpu"),
        ("aarch64", "cpu"),
        ("", "cpu"),
    ],
)
def test_profile_name(device, name):
    assert profile_name(device) == name


def test_a_packaged_name_is_found_and_an_unknown_one_lists_what_there_is(machine):
    save_profile(profile(entry()), machine / "h100.yaml")
    assert len(read_profile("h100").entries) == 1
    with pytest.raises(ProfileError, match="h999: no packaged profile has this name, wanted a path to a YAML file or one of: h100"):
        load_profile("h999")
    with pytest.raises(ProfileError, match="no packaged profile"):
        load_profile("workloads")


# choice


def test_the_tuned_entry_serves_its_shape(tmp_path, said):
    load(tmp_path, entry())
    assert choose("post_res", SHAPE, 8192, H100) == Choice({"block_C": 256, "threads": 128}, "tilelang", "exact")
    assert said() == []


@pytest.mark.parametrize("T", [4096, 5000, 8192, 12000, 16384])
def test_within_twice_the_bucket_is_exact(tmp_path, said, T):
    load(tmp_path, entry())
    assert choose("post_res", SHAPE, T, H100).origin == "exact"
    assert said() == []


@pytest.mark.parametrize("T", [0, 1, 7, 2048, 1 << 20])
def test_beyond_twice_the_bucket_is_nearest(tmp_path, said, T):
    load(tmp_path, entry())
    assert choose("post_res", SHAPE, T, H100).origin == "nearest"
    assert len(said()) == 1


@pytest.mark.parametrize("T", [1, 2048, 10**6])
def test_a_kernel_without_tokens_is_exact_at_every_token_count(tmp_path, said, T):
    load(tmp_path, entry(kernel="sum_parts"))
    assert choose("sum_parts", Problem(4, 2560, "float32"), T, H100).origin == "exact"
    assert not said()


A, B = {"block_C": 128, "threads": 128}, {"block_C": 256, "threads": 64}
NEAREST = [
    # what is asked for, entry a, entry b, which serves
    ((4, 2560, "bfloat16", 8192), {"tokens": 2048}, {"tokens": 8192}, "b"),
    ((4, 2560, "bfloat16", 4096), {"tokens": 2048}, {"tokens": 8192}, "b"),  # as far from both: the larger
    ((4, 2000, "bfloat16", 8192), {"C": 1280}, {"C": 2560}, "b"),
    ((4, 1500, "bfloat16", 8192), {"C": 1280}, {"C": 2560}, "a"),
    ((4, 2000, "bfloat16", 2048), {"C": 1280, "tokens": 2048}, {"C": 2560, "tokens": 8192}, "b"),  # C before T
    ((2, 1280, "bfloat16", 8192), {"n": 2, "C": 7168}, {"n": 4, "C": 1280}, "a"),  # the same n before anything else
    ((3, 2560, "bfloat16", 8192), {"n": 1}, {"n": 4}, "b"),
    ((4, 2560, "float16", 8192), {"dtype": "bfloat16"}, {"dtype": "float32"}, "a"),
    ((4, 2560, "float16", 8192), {"dtype": "bfloat16"}, {"dtype": "float16"}, "b"),
    ((4, 2560, "float32", 8192), {"dtype": "bfloat16"}, {"dtype": "float32", "C": 7168}, "b"),
    ((4, 128, "bfloat16", 8192), {"C": 7168}, {"C": 256}, "a"),  # b is nearer, but its block is larger than C
]


@pytest.mark.parametrize(("wanted", "a", "b", "serves"), NEAREST)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_nearest_valid_entry_serves(tmp_path, wanted, a, b, serves, swapped):
    entries = [entry(config=A, **a), entry(config=B, **b)]
    load(tmp_path, *(entries[::-1] if swapped else entries))
    n, C, dtype, T = wanted
    assert choose("post_res", Problem(n, C, dtype), T, H100).config == {"a": A, "b": B}[serves]


@pytest.mark.parametrize(
    ("entries", "p"),
    [
        ([], SHAPE),
        ([{"kernel": "pre"}], SHAPE),
        ([{"dtype": "float32"}], SHAPE),
        ([{}], Problem(4, 64)),  # every block is larger than C
        ([{"config": {"block_C": 256}}], SHAPE),
        ([{"config": {"block_C": 256, "threads": 128, "old_knob": 1}}], SHAPE),
        ([{"config": {"block_C": "wide", "threads": 128}}], SHAPE),
    ],
)
def test_without_a_valid_entry_the_default_serves_and_says_so_once(tmp_path, said, entries, p):
    load(tmp_path, *(entry(**e) for e in entries))
    for T in (8192, 100):
        assert choose("post_res", p, T, H100) == Choice(DEFAULT, "tilelang", "default")
    assert len(said()) == 1
    assert "post_res" in said()[0]


def test_an_entry_refused_for_its_shape_is_reported_with_the_reason(tmp_path, said):
    load(tmp_path, entry(config={"block_C": 4096, "threads": 64}), entry(C=1280))
    assert choose("post_res", SHAPE, 8192, H100).origin == "nearest"
    assert len(said()) == 1
    assert "block_C=4096: larger than C=2560" in said()[0]


def test_an_unseen_shape_is_reported_once_for_all_kernels_and_token_counts(tmp_path, said):
    load(tmp_path, entry(), entry(kernel="pre"))
    for T in (8192, 17, 100_000):
        for kernel in ("post_res", "pre"):
            assert choose(kernel, Problem(4, 3000), T, H100).origin == "nearest"
    assert len(said()) == 1
    assert "was not tuned at n=4, C=3000, bfloat16" in said()[0]
    choose("pre", Problem(4, 3001), 8192, H100)
    assert len(said()) == 2


def test_a_kernel_without_channels_or_streams_takes_any_entry_of_its_n(tmp_path, said):
    load(tmp_path, entry(kernel="sinkhorn"))
    assert choose("sinkhorn", Problem(4, 256, "float32"), 8192, H100).origin == "exact"
    assert said() == []


@pytest.mark.parametrize(("config", "offered"), [({}, DEFAULT), ({"block_C": 512, "threads": 64}, {"block_C": 512, "threads": 64})])
def test_the_reference_serves_where_the_profile_says_so_with_a_config_that_would_run(tmp_path, said, config, offered):
    load(tmp_path, entry(impl="reference", config=config), gpu="AMD EPYC", arch="cpu")
    assert choose("post_res", SHAPE, 8192, CPU) == Choice(offered, "reference", "exact")
    assert said() == []


# sources


def test_no_profile_says_what_to_run_once_per_gpu(said):
    for kernel in ("post_res", "pre"):
        assert choose(kernel, SHAPE, 8192, H100).origin == "default"
    assert said() == ["no tuned profile for NVIDIA H100 80GB HBM3; kernels run with defaults; to tune: mhc-tune --gpu h100"]


def test_a_gpu_without_a_profile_gets_that_of_a_related_one_and_says_so(machine, said):
    save_profile(profile(entry(config=A), gpu="NVIDIA H20", sm_count=78), machine / "h20.yaml")
    save_profile(profile(entry(config=B), gpu="NVIDIA H200", sm_count=132), machine / "h200.yaml")
    save_profile(profile(entry(), **OTHER_ARCH), machine / "a100.yaml")
    (machine / "broken.yaml").write_text("{}")
    for kernel in ("post_res", "pre"):
        choose(kernel, SHAPE, 8192, H100)
    assert choose("post_res", SHAPE, 8192, H100) == Choice(B, "tilelang", "exact")
    (about,) = (m for m in said() if "no tuned profile" in m)
    assert "NVIDIA H100 80GB HBM3" in about
    assert "as tuned on NVIDIA H200, which has the same architecture" in about
    assert "mhc-tune --gpu h100" in about


def test_what_a_related_profile_lacks_is_to_be_tuned_for_this_gpu(machine, said):
    save_profile(profile(entry(source_hash="another"), gpu="NVIDIA H200"), machine / "h200.yaml")
    assert choose("post_res", SHAPE, 8192, H100).origin == "default"
    (about,) = (m for m in said() if "another version" in m)
    assert about.endswith("run: mhc-tune --gpu h100 --kernels post_res")


def test_a_related_gpu_has_the_same_architecture_and_is_asked_last(machine, monkeypatch):
    save_profile(profile(entry(config=A), **OTHER_ARCH), machine / "a100.yaml")
    assert choose("post_res", SHAPE, 8192, H100).origin == "default"
    mp.reset()
    save_profile(profile(entry(config=B), **OTHER), machine / "h200.yaml")
    monkeypatch.setenv("MHC_PROFILE", "none")
    assert choose("post_res", SHAPE, 8192, H100).origin == "default"
    mp.reset()
    monkeypatch.delenv("MHC_PROFILE")
    assert choose("post_res", SHAPE, 8192, H100).config == B
    mp.reset()
    save_profile(profile(entry(config=A)), machine / "h100.yaml")
    assert choose("post_res", SHAPE, 8192, H100).config == A
    assert choose("post_res", SHAPE, 8192, CPU).origin == "default"


def test_the_packaged_profile_is_found_by_device_name(machine, said):
    save_profile(profile(entry()), machine / "h100.yaml")
    assert choose("post_res", SHAPE, 8192, H100).origin == "exact"
    assert said() == []


def test_a_malformed_packaged_profile_is_reported_and_defaults_serve(machine, said):
    (machine / "h100.yaml").write_text("schema_version: 7")
    assert choose("post_res", SHAPE, 8192, H100).origin == "default"
    assert choose("pre", SHAPE, 8192, H100).origin == "default"
    assert len(said()) == 1
    assert "h100.yaml" in said()[0]


def test_a_stale_entry_is_reported_once_and_not_used(tmp_path, said):
    path = load(tmp_path, entry(source_hash="another"), entry(kernel="pre"))
    for T in (8192, 1):
        assert choose("post_res", SHAPE, T, H100) == Choice(DEFAULT, "tilelang", "default")
    assert choose("pre", SHAPE, 8192, H100).origin == "exact"
    assert len(said()) == 1
    for part in ("post_res", str(path), "another version of the kernel", "mhc-tune --gpu h100 --kernels post_res"):
        assert part in said()[0]


def test_beside_a_stale_entry_a_fresh_one_serves(tmp_path, said):
    load(tmp_path, entry(source_hash="another"), entry(C=1280, config=A))
    assert choose("post_res", SHAPE, 8192, H100) == Choice(A, "tilelang", "nearest")
    assert "1 of 2 entries" in said()[0]


OTHER = {"gpu": "NVIDIA H200"}
OTHER_ARCH = {"gpu": "NVIDIA A100-SXM4-80GB", "arch": "sm_80"}
OTHER_BOARD = {"gpu": "NVIDIA H100 PCIe"}
ON_CPU = {"gpu": "AMD EPYC", "arch": "cpu"}


@pytest.mark.parametrize(
    ("how", "tuned_on", "used"),
    [
        ("load_profile", OTHER, True),
        ("load_profile", OTHER_ARCH, False),
        ("load_profile", OTHER_BOARD, True),
        ("load_profile", ON_CPU, False),
        ("MHC_PROFILE", OTHER, False),
        ("MHC_PROFILE", OTHER_ARCH, False),
        ("MHC_PROFILE", OTHER_BOARD, True),
        ("MHC_PROFILE", ON_CPU, False),
        ("packaged", OTHER, False),
        ("packaged", OTHER_BOARD, True),
    ],
)
def test_another_gpu_is_reported_and_used_only_where_asked_for(machine, tmp_path, monkeypatch, said, how, tuned_on, used):
    path = machine / "h100.yaml" if how == "packaged" else tmp_path / "other.yaml"
    save_profile(profile(entry(), **tuned_on), path)
    if how == "load_profile":
        load_profile(path)
    elif how == "MHC_PROFILE":
        monkeypatch.setenv("MHC_PROFILE", str(path))
    assert choose("post_res", SHAPE, 8192, H100).origin == ("exact" if used else "default")
    choose("pre", SHAPE, 8192, H100)
    about = [m for m in said() if tuned_on["gpu"] in m and "NVIDIA H100 80GB HBM3" in m]
    assert len(about) == 1
    assert ("used all the same" in about[0]) == used
    assert "mhc-tune --gpu h100" in about[0]


def test_a_profile_that_cannot_serve_leaves_the_next_source(machine, tmp_path):
    save_profile(profile(entry(config=A)), machine / "h100.yaml")
    load(tmp_path, entry(config=B, gbps=1), **ON_CPU)
    assert choose("post_res", SHAPE, 8192, H100).config == A
    assert choose("post_res", SHAPE, 8192, CPU).config == B


def test_a_cuda_profile_never_serves_the_cpu(tmp_path):
    load(tmp_path, entry())
    assert choose("post_res", SHAPE, 8192, CPU).origin == "default"


def test_on_the_cpu_pytorch_serves_what_no_entry_does(tmp_path, said):
    load(tmp_path, entry(C=2560), **ON_CPU)
    for p, kernel, T in itertools.product(
        (Problem(4, 64), Problem(4, 96, "float32")), ("post_res", "pre", "sum_parts", "sinkhorn"), (64, 8)
    ):
        assert choose(kernel, p, T, CPU) == Choice(DEFAULT, "reference", "default")
    shapes = [line for line in said() if "not tuned at" in line]
    assert [line.partition(": ")[0].partition("at ")[2] for line in shapes] == ["n=4, C=64, bfloat16, T~64", "n=4, C=96, float32, T~64"]
    assert "else PyTorch does (said once per shape); to tune: mhc-tune --gpu cpu --shapes 64x4x64" in shapes[0]
    assert shapes[1].endswith("mhc-tune --gpu cpu --shapes 64x4x96 --dtype float32")


def test_on_the_cpu_too_an_entry_that_is_refused_is_named(tmp_path, said):
    load(tmp_path, entry(tokens=64, config={"block_C": 4096, "threads": 64}), entry(tokens=128), **ON_CPU)
    assert choose("post_res", SHAPE, 64, CPU).origin == "exact"
    (line,) = said()
    assert "post_res: not served by the entry n=4, C=2560, bfloat16, tokens=64: block_C=4096: larger than C=2560" in line


def test_load_profile_wins_over_the_environment_and_that_over_the_packaged(machine, tmp_path, monkeypatch):
    save_profile(profile(entry(config=A)), machine / "h100.yaml")
    assert choose("post_res", SHAPE, 8192, H100).config == A
    save_profile(profile(entry(config=B)), tmp_path / "env.yaml")
    monkeypatch.setenv("MHC_PROFILE", str(tmp_path / "env.yaml"))
    assert choose("post_res", SHAPE, 8192, H100).config == A  # the environment is read once
    mp.reset()
    assert choose("post_res", SHAPE, 8192, H100).config == B
    load(tmp_path, entry())
    assert choose("post_res", SHAPE, 8192, H100).config == {"block_C": 256, "threads": 128}


def test_mhc_profile_takes_a_packaged_name_and_none(machine, monkeypatch, said):
    save_profile(profile(entry()), machine / "h100.yaml")
    monkeypatch.setenv("MHC_PROFILE", "none")
    assert choose("post_res", SHAPE, 8192, H100).origin == "default"
    assert mp.active_profile(H100) is None
    mp.reset()
    monkeypatch.setenv("MHC_PROFILE", "h100")
    assert choose("post_res", SHAPE, 8192, H100).origin == "exact"
    assert said() == []


@pytest.mark.parametrize("value", ["h999", "/nowhere/h100.yaml"])
def test_a_wrong_mhc_profile_is_an_error_not_a_default(monkeypatch, value):
    monkeypatch.setenv("MHC_PROFILE", value)
    with pytest.raises(ProfileError, match=f"MHC_PROFILE: {value}"):
        choose("post_res", SHAPE, 8192, H100)


def test_a_profile_that_fails_to_load_leaves_the_one_before(tmp_path):
    load(tmp_path, entry())
    (tmp_path / "bad.yaml").write_text("{}")
    with pytest.raises(ProfileError):
        load_profile(tmp_path / "bad.yaml")
    assert choose("post_res", SHAPE, 8192, H100).origin == "exact"


def test_an_unknown_kernel_and_an_unknown_device_are_errors():
    with pytest.raises(KeyError):
        choose("norm", SHAPE, 8, CPU)
    with pytest.raises(ValueError, match="device: got meta, wanted cpu or cuda"):
        choose("post_res", SHAPE, 8, torch.device("meta"))


# cost and safety


def test_the_second_look_up_touches_nothing_but_a_dictionary(tmp_path, monkeypatch):
    load(tmp_path, entry())
    first = choose("post_res", SHAPE, 8192, H100)

    def never(*args: Any) -> None:
        raise AssertionError("a cached look-up went to work again")

    for name in ("_choose", "_source", "device_name", "device_arch"):
        monkeypatch.setattr(mp, name, never)
    assert choose("post_res", Problem(4, 2560), 8200, H100) is first


def test_the_cache_does_not_grow_with_token_counts():
    for T in range(3000):
        choose("post_res", SHAPE, T, CPU)
    assert len(mp._STATE.choices) <= 13


def test_the_choice_does_not_depend_on_which_token_count_came_first(tmp_path):
    load(tmp_path, entry(tokens=2048, config=A), entry(tokens=8192, config=B))
    counts = [*range(2800, 6000, 100), 0, 1, 10**6]
    one = [choose("post_res", SHAPE, T, H100).config for T in counts]
    mp.reset()
    load_profile(tmp_path / "mine.yaml")
    other = [choose("post_res", SHAPE, T, H100).config for T in reversed(counts)]
    assert one == other[::-1]


def test_threads_agree_while_the_profile_is_replaced(tmp_path):
    load(tmp_path, entry())
    wrong: list[Any] = []

    def look_up() -> None:
        for i in range(300):
            choice = choose("post_res", Problem(4, 1000 + i % 7), 8192, H100)
            if choice.config not in (A, {"block_C": 256, "threads": 128}):
                wrong.append(choice)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for t in threads:
        t.start()
    load(tmp_path, entry(config=A))
    for t in threads:
        t.join()
    assert not wrong
    assert choose("post_res", Problem(4, 1000), 8192, H100).config == A


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_the_lock_is_held_does_not_hang():
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with mp._STATE.lock:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    pid = os.fork()
    if pid == 0:
        ok = mp._STATE.lock.acquire(timeout=5)
        os._exit(0 if ok else 1)
    _, status = os.waitpid(pid, 0)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_loader_imports_no_tilelang_before_a_kernel_is_needed():
    code = "import sys, mhc.profile as m; m.packaged_names(); sys.exit('tilelang' in sys.modules or 'tuner' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(mp.__file__).parents[1], check=False).returncode == 0


def test_every_packaged_profile_is_valid(monkeypatch):
    monkeypatch.undo()
    for name in mp.packaged_names():
        assert read_profile(name).entries, name
