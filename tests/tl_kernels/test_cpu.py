"""The rewrite for the CPU target: TVM's JSON of a function is internal to the pinned TileLang, so its effect is pinned here."""

import threading
import time

import pytest
import tilelang
import tilelang.language as T
import torch

from tl_kernels import KERNELS, NAMES
from tl_kernels.cpu import HEADER, LEAN, _lean, available, compile_cpu, to_cpu


def test_tilelang_is_the_pinned_release():
    assert tilelang.__version__.startswith("0.1.15")


def test_no_gpu_scope_or_bfloat16_is_left():
    for name in NAMES:
        kernel = KERNELS[name]
        p = kernel.problem(4, 256)
        before = kernel.build(p, kernel.default(p))
        after = to_cpu(before).script()
        for word in ("local.fragment", "shared.dyn", "bfloat16", "T.parallel", "layout_map"):
            assert word not in after, (name, word)
        assert before.script() == kernel.build(p, kernel.default(p)).script(), "the rewrite changed its input"


@pytest.mark.parametrize("type", ["half", "float4", "int32_t2", "tl::clamp"])
def test_programs_that_use_tilelangs_header_include_it(type):
    plain, other = (f"{HEADER}\nint32_t kernel({name}* x, int32_t float4_of_them);" for name in ("float", type))
    assert _lean(other) == other
    assert _lean(plain) == plain.replace(HEADER, LEAN)


def program():
    @T.prim_func
    def rounded_product(a: T.Tensor((3, 16, 32), "float32"), b: T.Tensor((8, 32), "float32"), c: T.Tensor((3, 16, 8), "float32")):
        with T.Kernel(1, threads=32):
            a_s = T.alloc_shared((3, 16, 32), "bfloat16")
            b_s = T.alloc_shared((8, 32), "bfloat16")
            c_f = T.alloc_fragment((16, 8), "float32")
            for i, j, k in T.Parallel(3, 16, 32):
                a_s[i, j, k] = T.cast(a[i, j, k], "bfloat16")
            for j, k in T.Parallel(8, 32):
                b_s[j, k] = T.cast(b[j, k], "bfloat16")
            for i in T.serial(3):
                T.clear(c_f)
                T.gemm(a_s[i, :, :], b_s, c_f, transpose_B=True)
                T.copy(c_f, c[i, :, :])

    return rounded_product


needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler for the CPU target")


@needs_compiler
def test_casts_round_to_nearest_even_and_one_matrix_of_several_multiplies():
    run = compile_cpu(program())
    a, b, c = torch.randn(3, 16, 32), torch.randn(8, 32), torch.full((3, 16, 8), float("nan"))
    a[0, 0, :3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-130)])  # ties to even, a subnormal
    run(a, b, c)
    want = a.bfloat16().double() @ b.bfloat16().double().T
    assert torch.allclose(c.double(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def roles(buffers=2, back=False, both=False):
    """The first role doubles what the last role made in the same step; the middle one adds up what the first made in the step before."""

    @T.prim_func
    def take_roles(a: T.Tensor((5, 8), "float32"), doubled: T.Tensor((5, 8), "float32"), sums: T.Tensor((5, 8), "float32")):
        with T.Kernel(1, threads=384):
            tx = T.get_thread_binding()
            made = T.alloc_shared((8,), "float32")
            kept = T.alloc_shared((buffers, 8), "float32")
            total = T.alloc_fragment((8,), "float32")
            T.annotate_min_blocks_per_sm(1)
            T.clear(total)
            for i in T.serial(6):
                T.sync_threads()
                if tx < 128:
                    if i < 5:
                        T.sync_threads(2, 256)
                        for c in T.Parallel(8):
                            kept[i % buffers, c] = 2 * made[c]
                        for c in T.Parallel(8):
                            doubled[i, c] = kept[i % buffers, c]
                        T.fence_proxy_async()
                    if back:
                        T.named_barrier_arrive(3, 256)
                elif tx < 256:
                    if both:
                        T.sync_threads(2, 256)
                    if i >= 1:
                        for c in T.Parallel(8):
                            total[c] += kept[(i - 1) % buffers, c]
                        if tx == 128 and i < 6:
                            for c in T.Parallel(8):
                                sums[i - 1, c] = total[c]
                else:
                    if back:
                        T.sync_threads(3, 256)
                    if i < 5:
                        for c in T.Parallel(8):
                            made[c] = a[i, c] + 1
                        T.named_barrier_arrive(2, 256)

    return take_roles


def play(order, buffers):
    a = torch.randn(5, 8)
    doubled, sums = torch.full((5, 8), float("nan")), torch.full((5, 8), float("nan"))
    compile_cpu(roles(buffers), order=order)(a, doubled, sums)
    want = 2 * (a + 1)
    assert torch.equal(doubled, want)
    return torch.allclose(sums, want.cumsum(0))


@needs_compiler
def test_roles_run_in_every_order_their_barriers_allow():
    assert [play(order, buffers=2) for order in range(3)] == [True] * 3
    # with one buffer, whether the first role overwrites what the middle one has yet to read is up to chance on a GPU
    assert not all(play(order, buffers=1) for order in range(3))


def loops(begin=True, buffers=2, extents=(6, 6)):
    """A role writes what the other reads an iteration later, each in a loop of its own."""

    @T.prim_func
    def take_turns(a: T.Tensor((5, 8), "float32"), out: T.Tensor((5, 8), "float32")):
        with T.Kernel(1, threads=256):
            tx = T.get_thread_binding()
            kept = T.alloc_shared((buffers, 8), "float32")
            scale = T.alloc_fragment((8,), "float32")
            if tx < 128:
                for i in T.serial(extents[0]):
                    if begin:
                        T.ptx_wait_group(0)
                        T.sync_threads(2, 256)
                    if i < 5:
                        for c in T.Parallel(8):
                            kept[i % buffers, c] = a[i, c]
                    if not begin:
                        T.sync_threads(2, 256)
            else:
                for c in T.Parallel(8):
                    scale[c] = 2.0
                for i in T.serial(extents[1]):
                    T.sync_threads(2, 256)
                    if i >= 1:
                        for c in T.Parallel(8):
                            out[i - 1, c] = scale[c] * kept[(i - 1) % buffers, c]

    return take_turns


@needs_compiler
def test_roles_with_loops_of_their_own_take_turns():
    def right(order, buffers):
        a, out = torch.randn(5, 8), torch.full((5, 8), float("nan"))
        compile_cpu(loops(buffers=buffers), order=order)(a, out)
        return torch.equal(out, 2 * a)

    assert [right(order, 2) for order in (0, 1)] == [True, True]
    assert not all(right(order, 1) for order in (0, 1))


@pytest.mark.parametrize("program", [{"begin": False}, {"extents": (6, 7)}])
def test_loops_that_do_not_begin_together_are_refused(program):
    with pytest.raises(ValueError, match="two roles wait for each other at barrier 2"):
        to_cpu(loops(**program))


def test_roles_that_wait_for_each_other_are_refused():
    for program, words in ((roles(back=True), "each of the roles"), (roles(both=True), "two roles wait for each other at barrier 2")):
        with pytest.raises(ValueError, match=words):
            to_cpu(program)


def thread_index(use):
    @T.prim_func
    def store_it(a: T.Tensor((128,), "float32")):
        with T.Kernel(1, threads=128):
            tx = T.get_thread_binding()
            if use == "index":
                a[tx] = 1.0
            elif use == "warp":
                if tx // 32 == 0:
                    a[0] = 1.0
            else:
                if tx == 0 and a[1] > 0.0:
                    a[0] = 1.0
                else:
                    a[2] = 1.0

    return store_it


@pytest.mark.parametrize("use", ["index", "warp", "else"])
def test_the_thread_index_has_no_other_use(use):
    with pytest.raises(ValueError, match="thread index"):
        to_cpu(thread_index(use))


def counters():
    @T.prim_func
    def count(a: T.Tensor((2, 4), "uint32"), b: T.Tensor((4,), "int32"), out: T.Tensor((3, 2), "uint32")):
        with T.Kernel(3, threads=32) as s:
            tx = T.get_thread_binding()
            if tx == 0:
                out[s, 0] = T.atomic_add(a[1, 2], T.uint32(0xFFFFFFFF), memory_order="acq_rel", return_prev=True)
                T.atomic_add(b[s], -5)
                T.atomic_store(a[0, s], T.uint32(7) + T.cast(s, "uint32"), memory_order="release")
                out[s, 1] = T.atomic_load(a[0, s], memory_order="acquire")

    return count


@needs_compiler
@pytest.mark.parametrize("concurrent", [False, True])
def test_atomics_are_the_compilers(concurrent):
    run = compile_cpu(counters(), concurrent=concurrent)
    a, b, out = torch.zeros(2, 4, dtype=torch.uint32), torch.zeros(4, dtype=torch.int32), torch.full((3, 2), 9, dtype=torch.uint32)
    run(a, b, out)
    assert a.tolist() == [[7, 8, 9, 0], [0, 0, 2**32 - 3, 0]]
    assert b.tolist() == [-5, -5, -5, 0]
    assert sorted(out[:, 0].tolist()) == [0, 2**32 - 2, 2**32 - 1]  # unsigned, and every block saw another
    assert out[:, 1].tolist() == [7, 8, 9]
    source = (run.jit if concurrent else run).get_kernel_source()
    assert all(name in source for name in ("cpu_add_uint32(", "cpu_add_int32(", "cpu_store_uint32(", "cpu_load_uint32("))


def ring(rounds=20, big=8, missing=-1):
    """Every block sends its value to the next one of its group and waits for the one before, again and again; ``missing`` sends nothing."""

    @T.prim_func
    def pass_on(words: T.Tensor((2, 3, rounds), "uint32"), out: T.Tensor((2, 3), "uint32")):
        with T.Kernel(3, 2, threads=32) as (s, g):
            room = T.alloc_shared((big,), "float32")
            value = T.alloc_fragment((1,), "uint32")
            seen = T.alloc_fragment((1,), "uint32")
            for c in T.Parallel(big):
                room[c] = 1.0
            value[0] = T.cast(room[big - 1], "uint32") + T.cast(3 * g + s, "uint32")
            for i in T.serial(rounds):
                if s != missing:
                    T.atomic_store(words[g, s, i], value[0], memory_order="relaxed")
                T.clear(seen)
                for c in T.Parallel(1):
                    while seen[c] == T.uint32(0):
                        seen[c] = T.atomic_load(words[g, (s + 2) % 3, i], memory_order="relaxed")
                value[0] = seen[0]
            out[g, s] = value[0]

    return pass_on


def ring_tensors(rounds=20):
    return torch.zeros(2, 3, rounds, dtype=torch.uint32), torch.zeros(2, 3, dtype=torch.uint32)


@needs_compiler
def test_blocks_that_wait_for_each_other_run_at_once():
    before = threading.stack_size()
    run = compile_cpu(ring(big=4 << 20))  # 16 MB: twice the stack of the main thread
    words, out = ring_tensors()
    run(words, out)
    assert run.grid == [3, 2]
    assert out.tolist() == [[2, 3, 1], [5, 6, 4]]  # handed on 20 times, round a group of 3
    assert threading.stack_size() == before


@needs_compiler
def test_a_block_waiting_for_ever_and_one_that_fails_end_the_call():
    run = compile_cpu(ring(missing=1), timeout=0.5)
    with pytest.raises(TimeoutError, match="of 6 blocks"):
        run(*ring_tensors())

    run, running = compile_cpu(ring(missing=1)), threading.active_count()
    with pytest.raises(ValueError, match="shape mismatch"):
        run(*ring_tensors(rounds=21))
    jit, start = run.jit, time.monotonic()

    def failing(*args):
        if args[2:4] == (1, 0):
            raise KeyError("block 1, 0")
        jit(*args)

    run.jit = failing
    with pytest.raises(KeyError, match="block 1, 0"):
        run(*ring_tensors())
    assert time.monotonic() - start < 5
    assert threading.active_count() == running  # no thread stays behind


def test_the_grid_of_waiting_blocks_is_static():
    tokens = T.dynamic("tokens")

    @T.prim_func
    def wait(a: T.Tensor((tokens,), "int32")):
        with T.Kernel(tokens, threads=32) as s:
            while T.atomic_load(a[s]) == 0:
                T.atomic_store(a[s], 1)

    with pytest.raises(ValueError, match=r"wait: .* static"):
        compile_cpu(wait)


def several():
    @T.prim_func
    def products(a: T.Tensor((2, 16, 8), "float32"), b: T.Tensor((3, 4, 8), "float32"), c: T.Tensor((6, 16, 4), "float32")):
        with T.Kernel(1, threads=128):
            a_s = T.alloc_shared((2, 16, 8), "float32")
            b_s = T.alloc_shared((3, 4, 8), "float32")
            c_f = T.alloc_fragment((16, 4), "float32")
            T.copy(a, a_s)
            T.copy(b, b_s)
            T.fill(c_f, 99.0)
            for i in T.serial(6):
                T.gemm(a_s[i % 2, :, :], b_s[(i + 1) % 3, :, :], c_f, transpose_B=True, clear_accum=True)
                T.wait_wgmma(0)
                T.copy(c_f, c[i, :, :])

    return products


@needs_compiler
def test_products_of_slices_can_start_from_zero():
    a, b, c = torch.randn(2, 16, 8), torch.randn(3, 4, 8), torch.empty(6, 16, 4)
    compile_cpu(several())(a, b, c)
    assert torch.allclose(c, torch.stack([a[i % 2] @ b[(i + 1) % 3].T for i in range(6)]), atol=1e-5)
