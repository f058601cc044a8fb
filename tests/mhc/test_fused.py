"""enter, boundary and leave: numbers against the float64 reference, gradients that are missing, tickets, checks, torch.compile."""

import pytest
import torch

import mhc
from mhc import backend, fused, ops, profile, signatures
from mhc.signatures import COMPOSITES, FUSED_KERNELS
from tests.conftest import relative_error
from tl_kernels import KERNELS, reference

OPTIONS = (1e-6, 1e-6, 2.0, 5, 1e-6, "columns_first")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
BACKWARDS = tuple(pair[1].name for pair in COMPOSITES.values())
#: What a boundary is given beside the first connection's results.
NAMES = ("x", "phi", "alpha", "b", "f", "next_phi", "next_alpha", "next_b", "next_f")
#: And what comes out.
RESULTS = ("u", "H_post", "H_res", "y", "next_u", "next_H_post", "next_H_res", "next_y")


def make_inputs(T=5, n=4, C=32, dtype=torch.float32, device="cpu", seed=0):
    """Two connections and the outputs of two layers, in the order of NAMES; leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    M = n * n + 2 * n

    def make(*shape, of=torch.float32, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, of).requires_grad_()

    def connection():
        return make(M, n * C, scale=(n * C) ** -0.5), make(3), make(M)

    return [make(T, n, C, of=dtype), *connection(), make(T, C, of=dtype), *connection(), make(T, C, of=dtype)]


def exact_coefficients(x, phi, alpha, b, norm_eps, pre_eps, post_mult, iters, eps, order):
    z, rinv = reference.project(x, phi, norm_eps)
    H_pre, H_post, h_res = reference.activate(z, rinv, alpha, b, pre_eps, post_mult)
    if iters == 0:
        return H_pre, H_post, torch.eye(x.shape[1], dtype=x.dtype).expand_as(h_res)
    return H_pre, H_post, reference.sinkhorn(h_res, iters, eps, order)


def exact(inputs, options=OPTIONS):
    """All that enter, boundary and leave give, with u, y, next u, next y and the coefficients differentiable by autograd alone."""
    x, phi, alpha, b, f, next_phi, next_alpha, next_b, next_f = inputs
    H_pre, H_post, H_res = exact_coefficients(x, phi, alpha, b, *options)
    u, y = reference.pre(x, H_pre), reference.post_res(x, f, H_post, H_res)
    next_H_pre, next_H_post, next_H_res = exact_coefficients(y, next_phi, next_alpha, next_b, *options)
    next_u, next_y = reference.pre(y, next_H_pre), reference.post_res(y, next_f, next_H_post, next_H_res)
    return dict(zip(RESULTS, (u, H_post, H_res, y, next_u, next_H_post, next_H_res, next_y), strict=True))


def chained(inputs, options=OPTIONS):
    x, phi, alpha, b, f, next_phi, next_alpha, next_b, next_f = inputs
    u, _, H_post, H_res, _, ticket = ops.enter(x, phi, alpha, b, *options)
    y, next_u, _, next_H_post, next_H_res, _, ticket = ops.boundary(x, f, H_post, H_res, ticket, next_phi, next_alpha, next_b, *options)
    next_y = ops.leave(y, next_f, next_H_post, next_H_res, ticket)
    return dict(zip(RESULTS, (u, H_post, H_res, y, next_u, next_H_post, next_H_res, next_y), strict=True))


def unchained(inputs, options=OPTIONS):
    x, phi, alpha, b, f, next_phi, next_alpha, next_b, next_f = inputs
    u, _, H_post, H_res, _, ticket = ops.enter(x, phi, alpha, b, *options)
    y = ops.leave(x, f, H_post, H_res, ticket)
    next_u, _, next_H_post, next_H_res, _, ticket = ops.enter(y, next_phi, next_alpha, next_b, *options)
    next_y = ops.leave(y, next_f, next_H_post, next_H_res, ticket)
    return dict(zip(RESULTS, (u, H_post, H_res, y, next_u, next_H_post, next_H_res, next_y), strict=True))


def gradients(out, used, inputs, seed=1):
    """Gradients of a weighted sum of the results named in ``used``; zeros for inputs they do not depend on."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in out.items()}
    grads = torch.autograd.grad([out[k] for k in used], inputs, [weights[k].to(out[k]) for k in used], allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]


def assert_close(names, got, want, tolerance):
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape, name
        error = relative_error(g, w)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check(inputs, tolerance, used=("next_u", "next_y"), options=OPTIONS, path=chained):
    doubles = [t.detach().double().cpu().requires_grad_() for t in inputs]
    out, want = path(inputs, options), exact(doubles, options)
    assert_close(out, out.values(), want.values(), tolerance)
    got = gradients(out, used, inputs)
    assert [g.dtype for g in got] == [i.dtype for i in inputs]
    assert_close(NAMES, got, gradients(want, used, doubles), tolerance)


@pytest.mark.parametrize("path", [chained, unchained])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("T", [0, 1, 5])
def test_forward_and_gradients(T, dtype, path, device):
    check(make_inputs(T=T, dtype=dtype, device=device), TOLERANCE[dtype], ("u", "next_u", "next_y"), path=path)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("C", [1, 20])
def test_every_n(n, C):
    check(make_inputs(T=7, n=n, C=C), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize(("T", "C", "dtype"), [(3, 77, torch.float32), (130, 1280, torch.bfloat16)], ids=str)
def test_other_shapes_on_a_gpu(n, T, C, dtype):
    """Eight draws together. At n = 1 b has two gradients that count, each a sum over tokens and channels: in one draw of several they come
    out near zero, and the rounding of the streams is then large beside them (2.5e-2, the PyTorch reference likewise)."""
    wrong, size = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for seed in range(8):
        inputs = make_inputs(T=T, n=n, C=C, dtype=dtype, device="cuda", seed=seed)
        doubles = [t.detach().double().cpu().requires_grad_() for t in inputs]
        out, want = chained(inputs), exact(doubles)
        assert_close(out, out.values(), want.values(), TOLERANCE[dtype])
        pairs = zip(NAMES, gradients(out, ("next_u", "next_y"), inputs), gradients(want, ("next_u", "next_y"), doubles), strict=True)
        for name, g, w in pairs:
            wrong[name] += float((g.double().cpu() - w).square().sum())
            size[name] += float(w.square().sum())
    assert all((wrong[name] / size[name]) ** 0.5 <= TOLERANCE[dtype] for name in NAMES), (wrong, size)


@pytest.mark.parametrize(
    "options", [(1e-2, 0.1, 3.0, 2, 1e-3, "rows_first"), (1e-6, 1e-6, 2.0, 0, 1e-6, "columns_first")], ids=["other", "no mixing"]
)
def test_options_reach_the_backward(options, device):
    check(make_inputs(device=device), 1e-5, options=options)


def test_no_mixing_leaves_no_gradient_behind(device):
    inputs = make_inputs(device=device)
    out = chained(inputs, (*OPTIONS[:3], 0, *OPTIONS[4:]))
    assert torch.equal(out["H_res"].cpu(), torch.eye(4).expand(5, 4, 4))
    got = dict(zip(NAMES, gradients(out, ("next_u", "next_y"), inputs), strict=True))
    assert not got["phi"][8:].any()
    assert not got["b"][8:].any()
    assert got["alpha"][2] == 0
    assert got["phi"][:8].any()


USED = (("u",), ("y",), ("next_y",), ("next_u",), ("H_post",), ("H_res",), ("next_H_res",), ("y", "next_u"), ("y", "next_y"), ("u", "y"))


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("used", USED, ids=" ".join)
@pytest.mark.parametrize("path", [chained, unchained])
def test_results_nobody_differentiates(path, used):
    """y of a boundary may be used elsewhere too; whatever is not used gets no gradient, and no error."""
    check(make_inputs(), 1e-5, used, path=path)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("frozen", [("x",), ("phi", "alpha", "b"), ("f",), ("next_phi", "next_b"), ("x", "f", "next_f")], ids=" ".join)
def test_inputs_nobody_differentiates(frozen):
    inputs = make_inputs()
    wanted = dict(zip(NAMES, gradients(chained(inputs), ("next_u", "next_y"), inputs), strict=True))
    some = [t.detach() if name in frozen else t for name, t in zip(NAMES, inputs, strict=True)]
    left = {name: t for name, t in zip(NAMES, some, strict=True) if t.requires_grad}
    got = gradients(chained(some), ("next_u", "next_y"), list(left.values()))
    assert all(torch.equal(g, wanted[name]) for name, g in zip(left, got, strict=True))


@pytest.mark.usefixtures("reference_backend")
def test_a_ticket_used_twice():
    """Two layers in parallel on the same streams: the two dy add up."""
    inputs = make_inputs()
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for x, phi, alpha, b, f, *_, other in (inputs, doubles):
        if x is inputs[0]:
            u, _, H_post, H_res, _, ticket = ops.enter(x, phi, alpha, b, *OPTIONS)
            ys = [ops.leave(x, v, H_post, H_res, ticket) for v in (f, other)]
        else:
            H_pre, H_post, H_res = exact_coefficients(x, phi, alpha, b, *OPTIONS)
            u, ys = reference.pre(x, H_pre), [reference.post_res(x, v, H_post, H_res) for v in (f, other)]
        results.append(gradients({"u": u, "first": ys[0], "second": ys[1]}, ("u", "first", "second"), [x, phi, alpha, b, f, other]))
    assert_close(("x", "phi", "alpha", "b", "f", "other"), *results, 1e-5)


def test_a_ticket_has_no_storage(device):
    x, phi, alpha, b, *_ = make_inputs(device=device)
    ticket = ops.enter(x, phi, alpha, b)[-1]
    assert (ticket.shape, ticket.dtype, ticket.device) == (x.shape, x.dtype, x.device)
    assert ticket.untyped_storage().nbytes() == x.element_size()
    assert ticket.requires_grad


def test_non_contiguous_inputs_and_gradients(device):
    inputs = make_inputs(device=device)
    strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in inputs]
    assert not strided[0].is_contiguous()
    results = []
    for values in (inputs, strided):
        out = chained(values)
        # .sum() has a gradient that is one number, expanded
        grads = torch.autograd.grad(out["next_y"].sum() + out["next_u"].sum(), values)
        results.append([*(t.detach() for t in out.values()), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_deterministic_algorithms_and_inference_mode(device):
    inputs = make_inputs(device=device)
    want = chained(inputs)
    torch.use_deterministic_algorithms(True)  # fills every new tensor with NaN
    try:
        got = chained(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        again = chained(inputs)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
        assert torch.equal(again[name], value), name


def test_autocast_casts_nothing(device):
    inputs = make_inputs(device=device)
    want = chained(inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = chained(inputs)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.fixture
def _readable_tickets(monkeypatch):
    """opcheck compares results, and a ticket's one element is whatever the memory held."""

    def new_ticket(x):
        return x.new_zeros((1,)).as_strided_(x.shape, (0, 0, 0))

    monkeypatch.setattr(fused, "new_ticket", new_ticket)
    monkeypatch.setattr(signatures, "new_ticket", new_ticket)


def operator_inputs(name, device, T=5, n=4, C=32):
    """Random arguments by the signature, requiring gradients where it is a forward."""
    signature = next(s for pair in COMPOSITES.values() for s in pair if s.name == name)
    generator = torch.Generator().manual_seed(0)
    size = {"T": T, "n": n, "C": C, "M": n * n + 2 * n, "Q": n * n + 2 * n + 1, "K": n * C}
    args = [torch.randn(t.resolve(size), generator=generator).to(device) for t in signature.inputs]
    for t, value in zip(signature.inputs, args, strict=True):
        if t.name in ("H_res", "next_H_res", "H_pre", "next_H_pre", "H_post"):
            value.sigmoid_()
        elif t.name == "zs":  # its last row is 1/r
            value[-1].abs_()
        elif t.name == "phi":
            value.mul_(size["K"] ** -0.5)
    return [a.requires_grad_(name not in BACKWARDS) for a in args]


@pytest.mark.usefixtures("_readable_tickets")
@pytest.mark.parametrize("name", [*COMPOSITES, *BACKWARDS])
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.mhc, name).default, tuple(operator_inputs(name, device)))


@pytest.mark.parametrize("path", [chained, unchained])
def test_compiles_without_graph_break(path, device):
    inputs = make_inputs(device=device)
    used = ("u", "next_u", "next_y")
    want = path(inputs)
    wanted = gradients(want, used, inputs)
    got = torch.compile(path, backend="aot_eager", fullgraph=True)(inputs)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert all(torch.equal(g, w) for g, w in zip(gradients(got, used, inputs), wanted, strict=True))


@pytest.mark.usefixtures("reference_backend")
def test_a_ticket_may_cross_from_one_compiled_graph_to_another():
    inputs = make_inputs()
    x, phi, alpha, b, f, *_ = inputs

    def first(x):
        u, _, H_post, H_res, _, ticket = ops.enter(x, phi, alpha, b, *OPTIONS)
        return u, H_post, H_res, ticket

    def second(x, f, H_post, H_res, ticket):
        return ops.leave(x, f, H_post, H_res, ticket)

    results = []
    for one, two in ((first, second), (torch.compile(first, backend="aot_eager"), torch.compile(second, backend="aot_eager"))):
        u, *rest = one(x)
        results.append(gradients({"u": u, "y": two(x, f, *rest)}, ("u", "y"), inputs[:5]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_new_token_count_does_not_recompile():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda inputs: chained(inputs)["next_y"], backend=backend, fullgraph=True, dynamic=True)
    with mhc.use_backend("reference"):
        for T in (5, 6, 17):
            inputs = make_inputs(T=T)
            assert torch.equal(compiled(inputs), chained(inputs)["next_y"])
    assert len(graphs) == 1


def test_dispatch_modes_see_the_operators(device):
    """Selective checkpointing works by such modes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names = []
    inputs = make_inputs(device=device)
    with Seen():
        chained(inputs)["next_y"].sum().backward()
    assert [name for name in names if name.startswith("mhc")] == [
        *(f"mhc::{name}" for name in ("enter", "boundary", "leave")),
        *(f"mhc::{name}_bwd" for name in ("leave", "boundary", "enter")),
    ]


@pytest.mark.usefixtures("reference_backend")
def test_double_backward_is_refused():
    x, phi, alpha, b, *_ = make_inputs()
    (dx,) = torch.autograd.grad(ops.enter(x, phi, alpha, b)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mhc\.enter_bwd is not differentiable"):
        dx.square().sum().backward()


@pytest.mark.usefixtures("reference_backend")
class TestArguments:
    @pytest.mark.parametrize("name", [*COMPOSITES, *BACKWARDS])
    def test_every_shape_dtype_and_device_is_checked_by_name(self, name):
        signature = next(s for pair in COMPOSITES.values() for s in pair if s.name == name)
        op = getattr(ops, name, getattr(torch.ops.mhc, name).default)
        for k, t in enumerate(signature.inputs):
            args = operator_inputs(name, "cpu")
            good = args[k]
            if k != signature.anchor:
                args[k] = torch.cat([good, good])
                with pytest.raises(ValueError, match=rf"mhc\.{name}: {t.name}: got shape .*wanted .*\[{', '.join(t.dims.split())}\]"):
                    op(*args)
                args[k] = good.detach().to("meta")
                with pytest.raises(ValueError, match=rf"mhc\.{name}: {t.name}: got device meta"):
                    signature.check(args)
            args[k] = good.double()
            with pytest.raises(TypeError, match=rf"mhc\.{name}: .*got torch.float64"):
                op(*args)

    def test_streams_must_be_three_dimensional(self):
        _, phi, alpha, b, *_ = make_inputs()
        with pytest.raises(ValueError, match=r"mhc\.enter: x: got shape \(2, 5, 4, 32\), wanted \[T, n, C\]"):
            ops.enter(torch.zeros(2, 5, 4, 32), phi, alpha, b)

    @pytest.mark.parametrize(
        ("options", "message"), [((-1, 1e-6), "iters: got -1, wanted at least 0"), ((3, 1e-6, "up"), "order: got 'up'")]
    )
    def test_sinkhorn_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ops.enter(*make_inputs()[:4], 1e-6, 1e-6, 2.0, *options)

    def test_sinkhorn_rounds_are_a_whole_number(self):
        with pytest.raises(TypeError, match=r"sinkhorn iters: got 3\.5, wanted a whole number"):
            ops.enter(*make_inputs()[:4], 1e-6, 1e-6, 2.0, 3.5)

    def test_by_name_and_how_many(self):
        x, phi, alpha, b = make_inputs()[:4]
        want = ops.enter(x, phi, alpha, b, 1e-6, 1e-6, 2.0, 3)
        for got in (ops.enter(x, phi, alpha, b, iters=3), ops.enter(x=x, phi=phi, alpha=alpha, b=b, iters=3)):
            assert torch.equal(got[3], want[3])
        for wrong in ((x, phi, alpha), (x, phi, alpha, b, *OPTIONS, 1)):
            with pytest.raises((TypeError, RuntimeError), match="argument"):
                ops.enter(*wrong)


@pytest.mark.usefixtures("reference_backend")
def test_forward_mode_is_refused():
    """A tangent that is left out would be a gradient of zero; also where nothing requires a gradient."""
    x, *weights = (t.detach() for t in make_inputs()[:4])
    with pytest.raises(NotImplementedError, match=r"mhc\.enter: got a dual tensor; .*no forward-mode"):
        torch.func.jvp(lambda v: ops.enter(v, *weights)[0], (x,), (torch.ones_like(x),))
    for grad in (False, True):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                ops.enter(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *weights)
            ops.enter(x, *weights)  # nothing of it is dual


def test_many_gradients_in_one_call(device):
    """torch.autograd.grad's is_grads_batched, which jacobian(vectorize=True) uses."""
    inputs = make_inputs(device=device)
    y = chained(inputs)["next_y"]
    grads = torch.randn(3, *y.shape, device=device)
    got = torch.autograd.grad(y, inputs[0], grads, is_grads_batched=True, retain_graph=True)[0]
    want = torch.stack([torch.autograd.grad(y, inputs[0], g, retain_graph=True)[0] for g in grads])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", FUSED_KERNELS)
def test_signature_is_the_kernel_spec(name):
    kernel, signature = KERNELS[name], FUSED_KERNELS[name]
    strip = lambda tensors: [(t.name, t.dims, t.dtype, t.split) for t in tensors]  # noqa: E731
    assert strip(signature.inputs) == strip(kernel.inputs)
    assert strip(signature.outputs) == strip(kernel.outputs)
    assert signature.options == dict(kernel.options)


class TestKernelCalls:
    """Each kernel by itself, as a tuner's user would call it."""

    def test_numbers(self, device):
        x, phi, alpha, b, *_ = (t.detach() for t in make_inputs(device=device))
        parts = fused.KERNEL_CALLS["project_parts"](x, phi)
        want = reference.project_parts(x.double().cpu(), phi.double().cpu())
        assert relative_error(parts.double().sum(0), want[0]) <= 1e-5
        H_pre, H_post, H_res, zs = fused.KERNEL_CALLS["coefficients"](parts, alpha, b, *OPTIONS)
        exacts = exact_coefficients(x.double().cpu(), phi.double().cpu(), alpha.double().cpu(), b.double().cpu(), *OPTIONS)
        assert_close(("H_pre", "H_post", "H_res"), (H_pre, H_post, H_res), exacts, 1e-5)
        assert zs.shape == (25, 5)

    @pytest.mark.usefixtures("reference_backend")
    def test_arguments_are_checked(self):
        _, _, alpha, b, *_ = make_inputs()
        call = fused.KERNEL_CALLS["coefficients"]
        assert call(torch.ones(3, 25, 5), alpha, b)[0].shape == (5, 4)  # any number of splits
        with pytest.raises(ValueError, match=r"mhc\.coefficients: b: got shape \(24,\), wanted \(15,\)"):
            call(torch.ones(3, 16, 5), alpha, b)
        with pytest.raises(ValueError, match=r"mhc\.sum_parts: dab: got shape \(2, 26\), wanted \(2, 27\) = \[S2, M\+3\]"):
            fused.KERNEL_CALLS["sum_parts"](torch.ones(3, 24, 128), torch.ones(2, 26))


def test_a_newly_loaded_profile_serves_the_next_call(monkeypatch):
    served = []
    run_reference, choose = backend.run_reference, profile.choose
    impl = {"now": "reference"}
    monkeypatch.setattr(backend, "run_reference", lambda name, *rest: served.append(name) or run_reference(name, *rest))
    monkeypatch.setattr(profile, "choose", lambda *call: profile.Choice(choose(*call).config, impl["now"], "exact"))
    profile.reset()
    inputs = make_inputs(T=6)
    every = ["project_parts", "coefficients", "pre", "post_res_project", "coefficients", "pre", "post_res"]
    with torch.no_grad(), mhc.use_backend("auto"):
        chained(inputs)
        assert served == every
        impl["now"] = "tilelang"
        chained(inputs)
        assert served == every * 2
        profile.reset()
        chained(inputs)
        assert served == every * 2
    profile.reset()
