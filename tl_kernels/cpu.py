"""The CPU target: the same PrimFunc, rewritten for TileLang's C backend. No kernel source changes.

What the rewrite does. On the function: lower reducers to plain stores, ``T.gemm`` to loops, asynchronous copies to copies, and casts to
bfloat16 to rounding by hand. On TVM's JSON of it: drop layout annotations, put fragments and shared memory into local arrays, make
``T.Parallel`` serial, and store bfloat16 as float32, which the C backend lacks (the launcher converts at both ends). TVM's JSON is internal
to it: tilelang is pinned, and tests/tl_kernels/test_cpu.py fails loudly when it moves.

Roles of warps (``if tx < 256: ... else: ...``) run one after another (tl_kernels/cpu_roles.py).
Blocks that wait for each other, in a loop around ``T.atomic_load``, get an OS thread each; all others run one after another.
"""

import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import tilelang
import tilelang.language as T  # noqa: F401  (registers the dialect)
import torch
from tilelang import tvm
from tilelang.instrumentation import PassInstrumentationTool, compile_pass_instrumentation
from tilelang.jit.adapter import libgen
from tilelang.jit.adapter.wrapper import TLCPUSourceWrapper
from tvm import tirx

from tl_kernels.cpu_roles import find, lower_roles, op_of

SCOPES = {"local.fragment", "shared.dyn", "shared", "local.reducer"}
# batch: barriers shared by the sums of a T.reduce. pragma_import_c: CUDA source that comes with a program.
ANNOTATIONS = {"layout_map", "reducer_info", "reducer_info_v2", "batch", "pragma_import_c"}
PASS_CONFIGS = {"tirx.disable_vectorize": True}
#: Passes left out: of a small program up to half the time of lowering, of the largest a sixth, for expressions that g++ simplifies anyway.
NEEDLESS = {"tirx.Simplify"}
FLAGS = ("-O2",)
PARALLEL = 1  # tirx.ForKind
SERIAL = 0
# One thread plays all roles, so there is nobody to wait for: copies are done when they are issued, products and roles in program order.
NOTHING = {
    "tirx.tvm_storage_sync",
    "tirx.ptx_wait_group",
    "tirx.ptx_commit_group",
    "tl.ptx_wait_group",
    "tl.named_barrier_arrive",
    "tl.fence_proxy_async",
    "tl.wait_wgmma",
    "tl.set_max_nreg",
    "tl.mbarrier_wait_parity",
    "tl.ptx_cp_async_barrier_noinc",
    "tirx.ptx_arrive_barrier",
    "tl.tma_store_wait",
}
# TileLang's own lowering for target ``c`` makes plain loads and stores of these, which the compiler may move out of a loop. GCC's builtins
# do not: here in functions, as TileLang declares all that is called. Sequentially consistent, whatever order was asked for.
ATOMICS = {
    "tl.atomic_load_elem_op": "cpu_load",
    "tl.atomic_store_elem_op": "cpu_store",
    "tl.atomic_add_elem_op": "cpu_add",
    "tl.atomic_add_ret_elem_op": "cpu_add",
}
RUNTIME = r"""
#include <sched.h>
#define CPU_ATOMICS(name) \
  extern "C" name##_t cpu_load_##name(name##_t* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  extern "C" int32_t cpu_store_##name(name##_t* p, name##_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); return 0; } \
  extern "C" name##_t cpu_add_##name(name##_t* p, name##_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
CPU_ATOMICS(int32) CPU_ATOMICS(uint32) CPU_ATOMICS(int64) CPU_ATOMICS(uint64)
extern "C" int32_t cpu_yield() { return sched_yield(); }
"""
#: What TileLang has every program include: half precision and vectors, a third of a second for g++ to read. Few programs use any of it.
HEADER = "#include <tl_templates/cpp/common.h>"
LEAN = "\n".join(f"#include <{name}.h>" for name in ("math", "stdbool", "stdint", "stdio", "string"))
STACK = 64 << 20  # bytes a block's OS thread gets: tile buffers are arrays on its stack
_STACK_LOCK = threading.Lock()


def available():
    """True where a C++ compiler is on PATH: the CPU target needs nothing else."""
    return shutil.which("g++") is not None or shutil.which("c++") is not None


@functools.cache
def _register_intrinsics():
    def register(op, lower):
        try:
            tvm.ir.op.register_intrin_lowering(op, target="c", f=lower)
        except tvm.error.InternalError:  # this process has it already
            pass

    register("tirx.fabs", lambda op: tirx.call_pure_extern(op.dtype, "fabsf", op.args[0]))
    register("tl.fast_rcp", lambda op: tirx.const(1.0, op.dtype) / op.args[0])
    for name in ("tl.pdl_sync", "tl.pdl_trigger"):
        register(name, lambda op: tirx.const(0, "int32"))
    TLCPUSourceWrapper._TYPE_MAP.setdefault("uint32", "uint32_t")  # an argument type it forgot
    if RUNTIME not in TLCPUSourceWrapper.INIT_FUNC:  # what it puts into every program
        TLCPUSourceWrapper.INIT_FUNC += RUNTIME
        write = TLCPUSourceWrapper.update_lib_code
        TLCPUSourceWrapper.update_lib_code = lambda self, code: _lean(write(self, code))
        libgen.subprocess = types.SimpleNamespace(**vars(subprocess) | {"run": _run_compiler})


def _run_compiler(command, **kwargs):
    """``subprocess.run`` for TileLang, whose error tells what g++ said where it has that; otherwise it would go to stderr alone."""
    done = subprocess.run(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **kwargs})
    if done.stdout:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    return done


def _lean(source):
    """Without ``HEADER`` where nothing of it is used."""
    used = re.search(r"\b(half|clamp|(float|double|u?int\d+_t)(2|4|8|16))\b", source)
    return source if used else source.replace(HEADER, LEAN)


def _reducers(func):
    """Operation of each reducer, by its variable."""
    combine = {}

    def scan(node):
        if isinstance(node, tirx.SBlock):
            for key in ("reducer_info_v2", "reducer_info"):
                for var, info in dict(node.annotations.get(key, {})).items():
                    combine[var] = str(info["op"])

    tirx.stmt_functor.post_order_visit(func.body, scan)
    return combine


def _lower_gemm(call):
    """C += A B as three loops. TileLang's own for target ``c`` takes whole matrices only, not one of several in a buffer."""
    load = [region.args[0] for region in call.args[:3]]
    trans_A, trans_B, clear = (bool(call.args[i]) for i in (3, 4, 9))
    M, N, K = (int(call.args[i]) for i in (5, 6, 7))
    i, j, k = (tirx.Var(name, "int32") for name in "ijk")

    def at(which, row, column):
        start = list(load[which].indices)
        return load[which].buffer, [*start[:-2], start[-2] + row, start[-1] + column]

    (A, at_A), (B, at_B), (C, at_C) = at(0, *((k, i) if trans_A else (i, k))), at(1, *((j, k) if trans_B else (k, j))), at(2, i, j)
    a, b = (tirx.Cast(C.dtype, tirx.BufferLoad(buffer, index)) for buffer, index in ((A, at_A), (B, at_B)))
    body = tirx.BufferStore(C, tirx.BufferLoad(C, at_C) + a * b, at_C)
    body = tirx.For(k, 0, K, tirx.ForKind.SERIAL, body)
    if clear:
        body = tirx.SeqStmt([tirx.BufferStore(C, tirx.const(0, C.dtype), at_C), body])
    return tirx.For(i, 0, M, tirx.ForKind.SERIAL, tirx.For(j, 0, N, tirx.ForKind.SERIAL, body))


def _round_bfloat16(node):
    """A cast of float32 to bfloat16, which will be stored as float32: round to nearest even by hand, so that it still rounds."""
    if str(node.dtype) != "bfloat16" or str(node.value.dtype) != "float32":
        return None
    bits = tirx.call_intrin("uint32", "tirx.reinterpret", node.value)
    odd = tirx.bitwise_and(tirx.shift_right(bits, tirx.const(16, "uint32")), tirx.const(1, "uint32"))
    kept = tirx.bitwise_and(bits + tirx.const(0x7FFF, "uint32") + odd, tirx.const(0xFFFF0000, "uint32"))
    return tirx.Cast("bfloat16", tirx.call_intrin("float32", "tirx.reinterpret", kept))


def _lower_tile_ops(func):
    """Reducers become plain stores, products loops; asynchronous copies become copies, done when they are issued."""
    combine = _reducers(func)

    def tile_op(name, *args, annotations=None):
        return tirx.Evaluate(tirx.call_intrin("handle", tirx.op.Op.get(name), *args, annotations=annotations))

    def identity(op, dtype):
        return {"sum": tirx.const(0, dtype), "max": tirx.min_value(dtype), "min": tirx.max_value(dtype)}[op]

    def lower(stmt):
        call = stmt.value if isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tirx.Call) else None
        name = getattr(getattr(call, "op", None), "name", "")
        if name in ("tl.tileop.async_copy", "tl.tileop.tma_copy"):
            return tile_op("tl.tileop.copy", *call.args)
        if name in ("tl.tileop.gemm", "tl.tileop.wgmma_gemm"):
            return _lower_gemm(call)
        if name in NOTHING or (name == "tirx.call_extern" and getattr(call.args[0], "value", "") == "__nanosleep"):
            return tirx.Evaluate(0)
        if name == "tl.reducer_update":
            target, value = call.args
            op = combine[target.buffer.data]
            merged = target + value if op == "sum" else tirx.max(target, value) if op == "max" else tirx.min(target, value)
            return tirx.BufferStore(target.buffer, merged, target.indices)
        if name == "tl.tileop.reducer_init":
            buffer = call.args[0].args[0].buffer
            start = call.args[1] if len(call.args) > 1 else identity(combine[buffer.data], buffer.dtype)
            return tile_op("tl.tileop.fill", call.args[0], start)
        if name == "tl.tileop.finalize_reducer_v2":
            return tile_op("tl.tileop.copy", call.args[0], call.args[1])
        if name == "tl.tileop.finalize_reducer":
            return tirx.Evaluate(0)
        return None

    body = tirx.stmt_functor.ir_transform(func.body, None, lower, ["tirx.Evaluate"])
    return func.with_body(tirx.stmt_functor.ir_transform(body, None, _round_bfloat16, ["tirx.Cast"]))


def _is_waiting(stmt):
    return isinstance(stmt, tirx.While) and bool(find(stmt, lambda node: op_of(node) == "tl.atomic_load_elem_op"))


def _lower_waiting(body, stop):
    """A loop that waits gives way to other OS threads, and ends when the buffer ``stop`` (None: no such) is set."""

    def lower(stmt):
        if not _is_waiting(stmt):
            return None
        condition = stmt.condition
        if stop is not None:
            stopped = tirx.call_extern("int32", "cpu_load_int32", tirx.address_of(tirx.BufferLoad(stop, [0])))
            condition = tirx.And(stopped == 0, condition)
        return tirx.While(condition, tirx.SeqStmt([stmt.body, tirx.Evaluate(tirx.call_extern("int32", "cpu_yield"))]))

    return tirx.stmt_functor.ir_transform(body, None, lower, ["tirx.While"])


def _lower_atomic(call):
    name = ATOMICS.get(op_of(call))
    if name is None:
        return None
    address = call.args[0]
    values = [] if name == "cpu_load" else [call.args[1]]  # then, if at all, the order
    dtype = str(address.args[0].dtype) if op_of(address) == "tl.access_ptr" else "pointer"
    if dtype not in ("int32", "uint32", "int64", "uint64"):
        raise ValueError(f"atomics on the CPU target: got {dtype}, wanted elements of 32 or 64 bit integers")
    return tirx.call_extern(
        "int32" if name == "cpu_store" else dtype, f"{name}_{dtype}", address, *(tirx.Cast(dtype, value) for value in values)
    )


def _grid(func):
    """The loops over blocks, x first."""
    loops = find(func.body, lambda node: isinstance(node, tirx.For) and node.thread_binding is not None)
    loops = [loop for loop in loops if loop.thread_binding.thread_tag.startswith("blockIdx.")]
    return sorted(loops, key=lambda loop: loop.thread_binding.thread_tag)


def _one_block(func):
    """The function for one block: its index in each dimension of the grid, and a flag that ends all waiting, are arguments more.

    Returns it with the flag's buffer and the grid's extents.
    """
    loops = _grid(func)
    if not all(isinstance(loop.extent, tirx.IntImm) for loop in loops):
        raise ValueError(f"{func.attrs['global_symbol']}: a grid of blocks that wait for each other must be static on the CPU target")
    index = {loop.loop_var: tirx.Var(f"cpu_block_{i}", "int32") for i, loop in enumerate(loops)}
    handle, stop = tirx.Var("cpu_stop_handle", "handle"), tirx.decl_buffer((1,), "int32", "cpu_stop")

    def lower(loop):
        if loop.loop_var not in index:
            return None
        body = tirx.stmt_functor.substitute(loop.body, {loop.loop_var: index[loop.loop_var]})
        return tirx.For(loop.loop_var, 0, 1, loop.kind, body, loop.thread_binding, loop.annotations)

    body = tirx.stmt_functor.ir_transform(func.body, None, lower, ["tirx.For"])
    params, buffers = [*func.params, *index.values(), handle], {**func.buffer_map, handle: stop}
    return tirx.PrimFunc(params, body, func.ret_type, buffers, func.attrs), stop, [int(loop.extent) for loop in loops]


def to_cpu(func, order=0, stop=None):
    """Rewrite a CUDA PrimFunc for target ``c``. bfloat16 arguments become float32. ``order``: see tl_kernels/cpu_roles.py."""
    _register_intrinsics()
    body = _lower_waiting(lower_roles(func.body, order), stop)
    func = func.with_body(tirx.stmt_functor.ir_transform(body, None, _lower_atomic, ["tirx.Call"]))
    tree = json.loads(tvm.ir.save_json(_lower_tile_ops(func)))
    nodes = tree["nodes"]

    def is_annotation(i):
        return isinstance(i, int) and nodes[i]["type"] == "ffi.String" and nodes[i].get("data") in ANNOTATIONS

    for node in nodes:
        data = node.get("data")
        if node["type"] == "ffi.Map" and data:
            pairs = zip(data[::2], data[1::2], strict=True)
            node["data"] = [i for key, value in pairs if not is_annotation(key) for i in (key, value)]
    for node in nodes:
        data = node.get("data")
        if node["type"] == "ffi.String" and data in SCOPES:
            node["data"] = "local"
        elif node["type"] == "tirx.For" and data["kind"] == PARALLEL:
            data["kind"] = SERIAL
        if isinstance(data, dict):
            for key, value in data.items():
                if key == "dtype" and isinstance(value, str) and value.startswith("bfloat16"):
                    data[key] = value.replace("bfloat16", "float32")
    return tvm.ir.load_json(json.dumps(tree))


@tvm.ir.instrument.pass_instrument
class _LeaveOut:
    """Leaves out ``NEEDLESS``."""

    def should_run(self, mod, info):
        return info.name not in NEEDLESS


class _Passes(PassInstrumentationTool):
    """Brings :class:`_LeaveOut` into a compilation; TileLang makes the context that passes run in itself."""

    def create_pass_instrument(self):
        return _LeaveOut()


def _compile(func, **configs):
    configs = PASS_CONFIGS | configs
    with compile_pass_instrumentation(tools=[_Passes()]):
        return tilelang.compile(func, target="c", execution_backend="cython", pass_configs=configs, compile_flags=list(FLAGS))


def compile_cpu(func, concurrent=None, order=0, timeout=120.0):
    """Compile a CUDA PrimFunc for this machine's CPU; returns what takes CPU tensors: a JITKernel, or a :class:`Concurrent`.

    ``concurrent``: every block in an OS thread of its own; by default where the program waits for other blocks. ``order`` picks one of the
    legal orders of a block's roles.
    """
    if concurrent is None:
        concurrent = bool(find(func.body, _is_waiting))
    if not concurrent:
        return _compile(to_cpu(func, order))
    func, stop, grid = _one_block(func)
    # its roles may run in another order than written, which looks like reading before the first write
    return Concurrent(_compile(to_cpu(func, order, stop), **{"tl.disable_buffer_init_check": True}), grid, timeout)


class Concurrent:
    """A program for one block, run for every block of the grid at once. Blocks that wait longer than ``timeout`` seconds are an error."""

    def __init__(self, jit, grid, timeout):
        self.jit, self.grid, self.timeout = jit, grid, timeout

    def __call__(self, *tensors):
        blocks = list(itertools.product(*(range(extent) for extent in self.grid)))
        stop, errors = torch.zeros(1, dtype=torch.int32), []
        gate = threading.Barrier(len(blocks))  # no block starts to wait for one whose thread could not start

        def run(block):
            try:
                gate.wait()
                self.jit(*tensors, *block, stop)
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                stop.fill_(1)  # the others may wait for this block

        threads = [threading.Thread(target=run, args=(block,), daemon=True) for block in blocks]
        with _STACK_LOCK:
            before = threading.stack_size(STACK)
            try:
                for thread in threads:
                    thread.start()
            except BaseException:
                gate.abort()
                raise
            finally:
                threading.stack_size(before)
        end = time.monotonic() + self.timeout
        try:
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            late = sum(thread.is_alive() for thread in threads)
        finally:
            stop.fill_(1)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        if late:
            raise TimeoutError(f"{late} of {len(blocks)} blocks did not end in {self.timeout} s: they wait for each other")
