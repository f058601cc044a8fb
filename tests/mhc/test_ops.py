"""The operators: registration, numbers against the float64 reference, argument checks, autograd, torch.compile."""

import pytest
import torch

import mhc
from mhc.signatures import PAIRS, SIGNATURES
from tests.mhc.conftest import FORWARDS, OPERATORS, make_inputs
from tl_kernels import KERNELS, reference

STREAMS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def op(name):
    return getattr(torch.ops.mhc, name).default


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def relative(got, want):
    scale = want.double().abs().max().clamp_min(1e-30)
    return ((got.double() - want.double()).abs().max() / scale).item()


def assert_close(names, got, want, tolerance):
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape, name
        if g.numel():
            assert relative(g.cpu(), w.cpu()) <= tolerance, name


def expected(name, args, **options):
    return as_tuple(getattr(reference, name)(*(t.double().cpu() for t in args), **options))


@pytest.mark.parametrize("name", OPERATORS)
def test_signature_is_the_kernel_spec(name):
    kernel, signature = KERNELS[name], SIGNATURES[name]
    strip = lambda tensors: [(t.name, t.dims, t.dtype) for t in tensors]  # noqa: E731
    assert strip(signature.inputs) == strip(kernel.inputs)
    assert strip(signature.outputs) == strip(kernel.outputs)
    assert signature.options == dict(kernel.options)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("n", [1, 4])
def test_opcheck(name, n, device):
    args = make_inputs(name, n=n, device=device)
    grads = [a.requires_grad_(name in FORWARDS) for a in args]
    torch.library.opcheck(op(name), tuple(grads))


@pytest.mark.parametrize("dtype", STREAMS, ids=str)
@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_and_gradients(name, T, dtype, device):
    args = [a.requires_grad_() for a in make_inputs(name, T=T, dtype=dtype, device=device)]
    out = as_tuple(op(name)(*args))
    names = [t.name for t in PAIRS[name][0].outputs]
    exact = [a.detach().double().cpu().requires_grad_() for a in args]
    want = as_tuple(getattr(reference, name)(*exact))
    assert_close(names, [o.detach() for o in out], [w.detach() for w in want], TOLERANCE[dtype])
    grads = [torch.randn_like(o) for o in out]
    got = torch.autograd.grad(out, args, grads)
    wanted = torch.autograd.grad(want, exact, [g.double().cpu() for g in grads])
    assert [g.dtype for g in got] == [a.dtype for a in args]
    assert_close(["d" + t.name for t in PAIRS[name][0].inputs], got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{"iters": 3}, {"order": "rows_first"}, {"iters": 7, "eps": 1e-4, "order": "rows_first"}], ids=str)
def test_sinkhorn_options_reach_the_backward(options, device):
    (h,) = make_inputs("sinkhorn", device=device)
    h.requires_grad_()
    exact = h.detach().double().cpu().requires_grad_()
    got, want = torch.ops.mhc.sinkhorn(h, **options), reference.sinkhorn(exact, **options)
    assert_close(["H_res"], [got.detach()], [want.detach()], 1e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight.double().cpu()).sum().backward()
    assert_close(["dh_res"], [h.grad], [exact.grad], 2e-5)


def test_project_norm_eps_reaches_the_backward(device):
    x, phi = make_inputs("project", device=device)
    x = (x * 1e-2).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    _, rinv = torch.ops.mhc.project(x, phi, norm_eps=1e-3)
    rinv.sum().backward()
    reference.project(exact, phi.double().cpu(), norm_eps=1e-3)[1].sum().backward()
    assert_close(["dx"], [x.grad], [exact.grad], 1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_non_contiguous_inputs_give_the_same_numbers(name, device):
    args = make_inputs(name, device=device)
    strided = [torch.stack([a, torch.full_like(a, 7.0)], dim=-1)[..., 0] for a in args]
    assert any(not a.is_contiguous() for a in strided)
    for got, want in zip(as_tuple(op(name)(*strided)), as_tuple(op(name)(*args)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPERATORS)
def test_results_share_no_memory(name, device):
    args = make_inputs(name, n=1, C=1, device=device)
    tensors = [*args, *as_tuple(op(name)(*args))]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("name", FORWARDS)
def test_one_used_result_is_enough_for_gradients(name, device):
    """Unused results get no gradient tensor; those that must be there are zeros."""
    count = len(PAIRS[name][0].outputs)
    for used in range(count):
        args = [a.requires_grad_() for a in make_inputs(name, device=device)]
        exact = [a.detach().double().cpu().requires_grad_() for a in args]
        out, want = as_tuple(op(name)(*args))[used], as_tuple(getattr(reference, name)(*exact))[used]
        grad = torch.randn_like(out)
        out.backward(grad)
        want.backward(grad.double().cpu())
        names = [t.name for t in PAIRS[name][0].inputs]
        wanted = [torch.zeros_like(e) if e.grad is None else e.grad for e in exact]
        assert_close(names, [a.grad for a in args], wanted, 2e-5)


def test_double_backward_is_refused(device):
    x, H_pre = (a.requires_grad_() for a in make_inputs("pre", device=device))
    (dx,) = torch.autograd.grad(torch.ops.mhc.pre(x, H_pre).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mhc\.pre_bwd is not differentiable"):
        dx.square().sum().backward()


@pytest.mark.usefixtures("reference_backend")
class TestArguments:
    def test_every_shape_is_checked_by_name(self):
        for name in OPERATORS:
            signature = SIGNATURES[name]
            for k, t in enumerate(signature.inputs):
                if k == signature.anchor:
                    continue
                args = make_inputs(name)
                args[k] = torch.cat([args[k], args[k]])
                with pytest.raises(ValueError, match=rf"mhc\.{name}: {t.name}: got shape .*wanted .*\[{', '.join(t.dims.split())}\]"):
                    op(name)(*args)

    def test_every_coefficient_dtype_is_checked_by_name(self):
        for name in OPERATORS:
            for k, t in enumerate(SIGNATURES[name].inputs):
                if t.dtype == "stream":
                    continue
                args = make_inputs(name)
                args[k] = args[k].bfloat16()
                with pytest.raises(TypeError, match=rf"mhc\.{name}: {t.name}: got torch.bfloat16, wanted torch.float32"):
                    op(name)(*args)

    def test_streams_must_agree(self):
        x, f, H_post, H_res = make_inputs("post_res")
        with pytest.raises(TypeError, match=r"f: got torch.float16, wanted torch.float32, the dtype of x"):
            torch.ops.mhc.post_res(x, f.half(), H_post, H_res)

    def test_float64_streams_are_refused(self):
        x, H_pre = make_inputs("pre")
        with pytest.raises(TypeError, match=r"x: got torch.float64, wanted torch.bfloat16 or"):
            torch.ops.mhc.pre(x.double(), H_pre)

    @pytest.mark.parametrize("shape", [(5, 64), (2, 5, 4, 64), (5, 9, 64), (5, 0, 64), (5, 4, 0)], ids=str)
    def test_the_deciding_argument_is_checked_too(self, shape):
        with pytest.raises(ValueError, match=r"mhc\.pre: x: got shape .*wanted \[T, n, C\]"):
            torch.ops.mhc.pre(torch.zeros(shape), torch.zeros(5, 4))

    def test_M_that_no_n_gives(self):
        z, rinv, alpha, b = make_inputs("activate")
        with pytest.raises(ValueError, match=r"z: got shape \(5, 23\), wanted \(5, 24\)"):
            torch.ops.mhc.activate(z[:, :-1], rinv, alpha, b)

    def test_another_device(self):
        x, H_pre = make_inputs("pre")
        with pytest.raises(ValueError, match=r"H_pre: got device meta, wanted cpu, the device of x"):
            SIGNATURES["pre"].check((x, H_pre.to("meta")))

    @pytest.mark.parametrize(("options", "message"), [({"iters": 0}, "iters: got 0"), ({"order": "diagonal"}, "order: got 'diagonal'")])
    def test_sinkhorn_options(self, options, message):
        (h,) = make_inputs("sinkhorn")
        with pytest.raises(ValueError, match=message):
            torch.ops.mhc.sinkhorn(h, **options)

    def test_a_second_call_with_bad_arguments_fails_too(self):
        """The check of a shape is remembered; it must not stand for other shapes."""
        x, H_pre = make_inputs("pre")
        torch.ops.mhc.pre(x, H_pre)
        with pytest.raises(ValueError, match="H_pre"):
            torch.ops.mhc.pre(x, H_pre[:, :3])
        with pytest.raises(TypeError, match="H_pre"):
            torch.ops.mhc.pre(x, H_pre.bfloat16())


@pytest.mark.parametrize("streams", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_nothing(streams, device):
    x, f, H_post, H_res = make_inputs("post_res", dtype=streams, device=device)
    want = torch.ops.mhc.post_res(x, f, H_post, H_res)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = torch.ops.mhc.post_res(x, f, H_post, H_res)
    assert got.dtype is streams
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", FORWARDS)
def test_compiles_without_graph_break(name, device):
    args = [a.requires_grad_() for a in make_inputs(name, device=device)]
    want = as_tuple(op(name)(*args))
    wanted = torch.autograd.grad(sum(w.square().sum() for w in want), args)
    compiled = torch.compile(lambda *a: op(name)(*a), backend="aot_eager", fullgraph=True)
    got = as_tuple(compiled(*args))
    grads = torch.autograd.grad(sum(g.square().sum() for g in got), args)
    assert all(torch.equal(g, w) for g, w in zip((*got, *grads), (*want, *wanted), strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors_give_shapes_and_dtypes(name, requires_grad):
    args = [a.to("meta").requires_grad_(requires_grad) for a in make_inputs(name, dtype=torch.bfloat16)]
    with mhc.use_backend("reference"):
        want = as_tuple(op(name)(*make_inputs(name, dtype=torch.bfloat16)))
    got = as_tuple(op(name)(*args))
    assert [(g.device.type, g.shape, g.dtype) for g in got] == [("meta", w.shape, w.dtype) for w in want]


def test_dispatch_modes_see_the_operators(device):
    """Selective checkpointing and profilers work by such modes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names = []
    x, H_pre = (a.requires_grad_() for a in make_inputs("pre", device=device))
    with Seen():
        u = torch.ops.mhc.pre(x, H_pre)
    assert names == ["mhc::pre"]
    assert u.requires_grad


def test_functorch_gradients_are_refused(device):
    """As for every operator of torch.library; an error, not wrong numbers."""
    x, H_pre = make_inputs("pre", device=device)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda v: torch.ops.mhc.pre(v, H_pre).sum())(x)


@pytest.mark.usefixtures("reference_backend")
def test_forward_mode_is_refused():
    """A tangent that is left out would be a gradient of zero."""
    x, H_pre = make_inputs("pre")
    for frozen in (False, True):
        x.requires_grad_(not frozen)
        with pytest.raises(NotImplementedError, match=r"mhc\.pre: got a dual tensor; .*no forward-mode"):
            torch.func.jvp(lambda v: torch.ops.mhc.pre(v, H_pre), (x,), (torch.ones_like(x),))


def test_vmap(device):
    x, H_pre = make_inputs("pre", T=6, device=device)
    got = torch.func.vmap(torch.ops.mhc.pre)(x.view(2, 3, 4, 32), H_pre.view(2, 3, 4))
    assert torch.equal(got.view(6, 32), torch.ops.mhc.pre(x, H_pre))


def test_inference_mode(device):
    args = make_inputs("post_res", device=device)
    with torch.inference_mode():
        got = torch.ops.mhc.post_res(*args)
    assert torch.equal(got, torch.ops.mhc.post_res(*args))


def test_a_new_token_count_does_not_recompile(device):
    """T is dynamic in the kernels and in the graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(torch.ops.mhc.pre.default, backend=backend, fullgraph=True, dynamic=True)
    for T in (5, 6, 17):
        x, H_pre = make_inputs("pre", T=T, device=device)
        assert torch.equal(compiled(x, H_pre), torch.ops.mhc.pre(x, H_pre))
    assert len(graphs) == 1


def test_import_leaves_tilelang_out():
    import subprocess
    import sys

    code = "import sys, mhc, torch; mhc.HyperConnection(8); assert 'tilelang' not in sys.modules and 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_debug_prints_each_choice_once(monkeypatch, capsys):
    from mhc import profile

    monkeypatch.setenv("MHC_DEBUG", "1")
    profile.reset()  # a new choice is made, and printed
    x, H_pre = make_inputs("pre", C=96)
    with mhc.use_backend("tilelang"):
        for _ in range(3):
            torch.ops.mhc.pre(x, H_pre)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pre n=4 C=96" in line]
    assert line.startswith("mhc: pre n=4 C=96 float32 on cpu: tilelang, default: ")  # what serves, not the profile's advice
    assert "block_C" in line
    with mhc.use_backend("auto"):
        torch.ops.mhc.pre(x, H_pre)
    assert "mhc: pre n=4 C=96 float32 on cpu: reference, default: " in capsys.readouterr().err
