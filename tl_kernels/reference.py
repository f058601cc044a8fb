"""The specification: naive PyTorch, in whatever precision its inputs have. Every kernel answers to this in float64.

Shapes: x [T,n,C], f and u [T,C], phi [M,nC] (the paper's phi transposed, rows H_pre n, H_post n, H_res n*n as [source j, target i]),
alpha [3], b [M], H_pre and H_post [T,n], H_res [T,n,n] with y[i] = sum_j H_res[i,j] x[j].
"""

import torch


def project(x, phi, norm_eps=1e-6):
    """Eq. 14-15: z = vec(x) phi and 1/r, r = ||vec(x)|| / sqrt(nC)."""
    v = x.flatten(1)
    rinv = torch.rsqrt(v.square().mean(-1) + norm_eps)
    return v @ phi.T, rinv


def project_bwd(dz, drinv, x, phi, rinv):
    """Gradients of :func:`project` from its own 1/r, which holds norm_eps: dx = dz phi - d(1/r)/r^3 x/K, dphi = dz^T vec(x)."""
    v = x.flatten(1)
    dv = dz @ phi - (drinv * rinv**3)[:, None] * v / phi.shape[1]
    return dv.view_as(x), dz.T @ v


def activate(z, rinv, alpha, b, pre_eps=1e-6, post_mult=2.0):
    """Eq. 16-18: h = alpha z/r + b; H_pre = sigmoid(h) + pre_eps, H_post = post_mult sigmoid(h), and the logits of H_res as [T,i,j]."""
    n = streams(z.shape[-1])
    # rows whose norm overflowed have 1/r = 0: their h is b, also where z overflowed with it
    zr = torch.where(rinv[:, None] > 0, z * rinv[:, None], torch.zeros_like(z))
    pre, post, res = zr.split([n, n, n * n], dim=-1)
    b_pre, b_post, b_res = b.split([n, n, n * n])
    H_pre = torch.sigmoid(alpha[0] * pre + b_pre) + pre_eps
    H_post = post_mult * torch.sigmoid(alpha[1] * post + b_post)
    h_res = (alpha[2] * res + b_res).unflatten(-1, (n, n)).transpose(1, 2)
    return H_pre, H_post, h_res.contiguous()


def sinkhorn(h_res, iters=20, eps=1e-6, order="columns_first"):
    """Eq. 19 and 9: M0 = exp(h_res), then ``iters`` times M = T_r(T_c(M)); the first T_c is a softmax, so no logit overflows."""
    first, second = {"columns_first": (1, 2), "rows_first": (2, 1)}[order]
    m = torch.softmax(h_res, dim=first) + eps
    m = m / (m.sum(second, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(first, keepdim=True) + eps)
        m = m / (m.sum(second, keepdim=True) + eps)
    return m


def coefficients(parts, alpha, b, norm_eps=1e-6, pre_eps=1e-6, post_mult=2.0, iters=20, eps=1e-6, order="columns_first"):
    """Eq. 15-19 from the projections parts [S,Q,T]: H_pre, H_post, H_res and zs [Q,T], rows z^T and 1/r. ``iters=0``: H_res = identity."""
    total = parts.sum(0)
    zs = torch.cat([total[:-1], torch.rsqrt(total[-1:] + norm_eps)])
    return *_coefficients(zs[:-1].T, zs[-1], alpha, b, pre_eps, post_mult, iters, eps, order), zs


def _coefficients(z, rinv, alpha, b, pre_eps, post_mult, iters, eps, order):
    H_pre, H_post, h_res = activate(z, rinv, alpha, b, pre_eps, post_mult)
    identity = torch.eye(h_res.shape[-1], dtype=z.dtype, device=z.device).expand_as(h_res)
    return H_pre, H_post, sinkhorn(h_res, iters, eps, order) if iters else identity + 0 * h_res


def coefficients_bwd(dH_pre, dH_post, dH_res, zs, alpha, b, post_mult=2.0, iters=20, eps=1e-6, order="columns_first"):
    """Gradients of :func:`coefficients` from its own zs: dzs [Q,T], rows dz^T and c = -d(1/r)/r^3, and dab [1,M+3], dalpha before db."""
    z, rinv = zs[:-1].T, zs[-1]
    options = {"pre_eps": 0.0, "post_mult": post_mult, "iters": iters, "eps": eps, "order": order}
    dz, drinv, dalpha, db = vjp(_coefficients, (z, rinv, alpha, b), (dH_pre, dH_post, dH_res), **options)
    return torch.cat([dz.T, -(drinv * rinv**3)[None]]), torch.cat([dalpha, db])[None]


def post_res_coefficients_bwd(dH_post, dH_res, zs, alpha, b, **options):
    """:func:`coefficients_bwd` where H_pre has no gradient."""
    return coefficients_bwd(torch.zeros_like(dH_post), dH_post, dH_res, zs, alpha, b, **options)


def sum_parts(dphi, dab):
    """The second stage of the weight gradients, dphi [S,M,K] and dab [S2,M+3]: dphi [M,K], dalpha [3], db [M]."""
    return dphi.sum(0), dab[:, :3].sum(0), dab[:, 3:].sum(0)


def pre(x, H_pre):
    """F_pre: u = sum_j H_pre[j] x[j]."""
    return torch.einsum("tj,tjc->tc", H_pre, x)


def post_res(x, f, H_post, H_res):
    """F_post and F_res: y[i] = sum_j H_res[i,j] x[j] + H_post[i] f."""
    return torch.einsum("tij,tjc->tic", H_res, x) + H_post[:, :, None] * f[:, None, :]


def project_parts(x, phi):
    """Eq. 14-15 as sums over K that may come in splits, [S,Q,T]: rows z^T = phi vec(x)^T, then mean(vec(x)^2)."""
    v = x.flatten(1)
    return torch.cat([phi @ v.T, v.square().mean(-1)[None]])[None]


def post_res_project(x, f, H_post, H_res, phi, dtype=None):
    """:func:`post_res`, and :func:`project_parts` of y as stored: rounded to ``dtype``, the streams', a torch dtype or its name."""
    y = post_res(x, f, H_post, H_res)
    if dtype is not None:
        y = y.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).to(y.dtype)
    return y, project_parts(y, phi)


def _H_pre(parts, alpha, b, norm_eps, pre_eps):
    """H_pre [T,n] of z and the mean square, [1,Q,T]."""
    n = streams(parts.shape[1] - 1)
    return torch.sigmoid(alpha[0] * parts[0, :n].T * torch.rsqrt(parts[0, -1] + norm_eps)[:, None] + b[:n]) + pre_eps


def post_res_project_pre(x, f, H_post, H_res, phi, alpha, b, norm_eps=1e-6, pre_eps=1e-6, dtype=None):
    """:func:`post_res_project`, then :func:`pre` of the y that was stored: y, u and the parts."""
    y, parts = post_res_project(x, f, H_post, H_res, phi, dtype)
    return y, pre(y, _H_pre(parts, alpha, b, norm_eps, pre_eps)), parts


def project_pre(x, phi, alpha, b, norm_eps=1e-6, pre_eps=1e-6):
    """:func:`project_parts`, then :func:`pre`: u and the parts."""
    parts = project_parts(x, phi)
    return pre(x, _H_pre(parts, alpha, b, norm_eps, pre_eps)), parts


def streams_grad(dy, du, x, dzs, H_pre, H_res, phi):
    """The whole gradient of x, three uses of it at once: dx[j] = sum_i H_res[i,j] dy[i] + H_pre[j] du + (dz phi)_j + c/K x[j].

    dzs [Q,T]: dz^T, then c. Also dphi = dz^T vec(x), as [S,M,K].
    """
    v, dz, c = x.flatten(1), dzs[:-1], dzs[-1]
    dv = dz.T @ phi + c[:, None] * v / phi.shape[1]
    dx = torch.einsum("tij,tic->tjc", H_res, dy) + H_pre[:, :, None] * du[:, None, :] + dv.view_as(x)
    return dx, (dz @ v)[None]


def pre_streams_grad(dy, du, x, dzs, dab, zs, alpha, b, H_pre, H_res, phi):
    """:func:`pre_grad`, H_pre's part of :func:`coefficients_bwd`, and :func:`streams_grad`; dzs and dab come with the other parts of it."""
    n = x.shape[1]
    nothing = x.new_zeros(x.shape[0], n), x.new_zeros(x.shape[0], n, n)
    more, dab_more = coefficients_bwd(pre_grad(du, x), *nothing, zs, alpha, b, iters=0)
    dx, dphi = streams_grad(dy, du, x, torch.cat([more[:n], dzs[n:-1], dzs[-1:] + more[-1:]]), H_pre, H_res, phi)
    return dx, dphi, dab.sum(0, keepdim=True) + dab_more


def post_res_grads(dy, x, f, H_post):
    """Gradients of :func:`post_res` but dx: df = sum_i H_post[i] dy[i], dH_post[i] = <f, dy[i]>, dH_res[i,j] = <x[j], dy[i]>."""
    df = torch.einsum("ti,tic->tc", H_post, dy)
    return df, torch.einsum("tc,tic->ti", f, dy), torch.einsum("tjc,tic->tij", x, dy)


def pre_grad(du, x):
    """Gradient of :func:`pre` for H_pre: dH_pre[j] = <x[j], du>."""
    return torch.einsum("tjc,tc->tj", x, du)


def streams(M):
    """n from M = n*n + 2*n."""
    return round((M + 1) ** 0.5) - 1


def vjp(forward, inputs, grads, **options):
    """Gradients of ``forward(*inputs)`` for the output gradients ``grads``: the reference of every backward kernel."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        out = forward(*inputs, **options)
        return torch.autograd.grad(out, inputs, grads)
