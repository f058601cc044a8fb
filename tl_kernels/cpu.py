"""The CPU target: the same PrimFunc, rewritten for TileLang's C backend. No kernel source changes.

What the rewrite does, on TVM's JSON of the function: drop layout annotations, put fragments and shared memory into local arrays, make
``T.Parallel`` serial, lower reducers to plain stores, and store bfloat16 as float32 (the C backend has no bfloat16; the launcher
converts, so results are rounded once, where the tensors leave the kernel). TVM's JSON is internal to it: tilelang is pinned, and
tests/tl_kernels/test_cpu.py fails loudly when it moves.
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


def _lower_reducers(func):
    combine = {}

    def scan(node):
        if isinstance(node, tirx.SBlock):
            for key in ("reducer_info_v2", "reducer_info"):
                for var, info in dict(node.annotations.get(key, {})).items():
                    combine[var] = str(info["op"])

    tirx.stmt_functor.post_order_visit(func.body, scan)
    if not combine:
        return func

    def tile_op(name, *args):
        return tirx.Evaluate(tirx.call_intrin("handle", tirx.op.Op.get(name), *args))

    def identity(op, dtype):
        return {"sum": tirx.const(0, dtype), "max": tirx.min_value(dtype), "min": tirx.max_value(dtype)}[op]

    def lower(stmt):
        call = stmt.value if isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tirx.Call) else None
        name = getattr(getattr(call, "op", None), "name", "")
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

    return func.with_body(tirx.stmt_functor.ir_transform(func.body, None, lower, ["tirx.Evaluate"]))


def to_cpu(func):
    """Rewrite a CUDA PrimFunc for target ``c``. bfloat16 arguments become float32."""
    _register_intrinsics()
    tree = json.loads(tvm.ir.save_json(_lower_reducers(func)))
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
