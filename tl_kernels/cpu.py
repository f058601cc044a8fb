"""The CPU target: the same PrimFunc, rewritten for TileLang's C backend. No kernel source changes.

What the rewrite does. On the function: lower reducers to plain stores, ``T.gemm`` to loops, asynchronous copies to copies, and casts to
bfloat16 to rounding by hand. On TVM's JSON of it: drop layout annotations, put fragments and shared memory into local arrays, make
``T.Parallel`` serial, and store bfloat16 as float32, which the C backend lacks (the launcher converts at both ends). TVM's JSON is internal
to it: tilelang is pinned, and tests/tl_kernels/test_cpu.py fails loudly when it moves.
"""

import functools
import json
import shutil

import tilelang
import tilelang.language as T  # noqa: F401  (registers the dialect)
from tilelang import tvm
from tvm import tirx

SCOPES = {"local.fragment", "shared.dyn", "shared", "local.reducer"}
ANNOTATIONS = {"layout_map", "reducer_info", "reducer_info_v2", "batch"}  # batch: barriers shared by the sums of a T.reduce
PASS_CONFIGS = {"tirx.disable_vectorize": True}
FLAGS = ("-O2",)
PARALLEL = 1  # tirx.ForKind
SERIAL = 0


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
        if name == "tl.tileop.async_copy":
            return tile_op("tl.tileop.copy", *call.args)
        if name == "tl.tileop.gemm":
            return _lower_gemm(call)
        if name.endswith("ptx_wait_group"):
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


def to_cpu(func):
    """Rewrite a CUDA PrimFunc for target ``c``. bfloat16 arguments become float32."""
    _register_intrinsics()
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


def compile_cpu(func):
    """Compile a CUDA PrimFunc for this machine's CPU; returns a JITKernel that takes CPU tensors."""
    return tilelang.compile(to_cpu(func), target="c", execution_backend="cython", pass_configs=PASS_CONFIGS, compile_flags=list(FLAGS))
