"""DDP and FSDP2 on two processes, each with its CPU share or its GPU: the gradients and the dtypes of one process."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import mhc

DIM, N, TOKENS = 64, 4, 12


class Block(nn.Module):
    """Two connections through pre(), cross() and post(), and a head, as a model uses them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hc = mhc.HyperConnection(DIM, N)
        self.layer = nn.Linear(DIM, DIM)
        self.hc2 = mhc.HyperConnection(DIM, N)
        self.layer2 = nn.Linear(DIM, DIM)
        self.head = mhc.HyperHead(DIM, N)

    def forward(self, x):
        u, ctx = self.hc.pre(x)
        u, ctx = self.hc2.cross(self.layer(u), ctx)
        return self.head(self.hc2.post(self.layer2(u), ctx))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, N, DIM, generator=generator)


def loss_of(model, x):
    return model(x).float().square().mean()


def alone(device):
    model = Block().to(device)
    sum(loss_of(model, x.to(device)) for x in data()).div(2).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _worker(rank, port, kind, device_type):
    torch.set_num_threads(1)
    on_gpu = device_type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        with mhc.use_backend("tilelang" if on_gpu else "reference"):
            model = Block().to(device)
            if kind == "ddp":
                wrapped = DistributedDataParallel(model)
                rtol = 1e-4
            else:
                mesh = init_device_mesh(device_type, (2,))
                # its own group without a cast: coefficients stay float32 while the rest of the model computes in bfloat16
                fully_shard(model.head, mesh=mesh)
                for hc in (model.hc, model.hc2):
                    fully_shard(hc, mesh=mesh)
                    for method in ("pre", "cross", "post"):
                        register_fsdp_forward_method(hc, method)
                low = kind == "fsdp2-bfloat16"
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None, cast_forward_inputs=low)
                wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
                rtol = 5e-2 if low else 1e-4
            loss_of(wrapped, data()[rank].to(device)).backward()
            for name, want in alone(device).items():
                got = full(dict(model.named_parameters())[name].grad)
                assert got.dtype is torch.float32, name
                assert (got - want).norm() <= rtol * want.norm(), (name, got, want)
    finally:
        dist.destroy_process_group()
    # Everything was checked. Of torch 2.13's own teardown under FSDP2 on gloo one in four processes ends in "terminate called without an
    # active exception", after the interpreter has gone (no Python frame); it is not what this tests.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-bfloat16"])
def test_two_processes_give_the_gradients_of_one(kind, free_port):
    torch.multiprocessing.spawn(_worker, args=(free_port, kind, "cpu"), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wanted two CUDA devices")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-bfloat16"])
def test_two_gpus_give_the_gradients_of_one(kind, free_port):
    torch.multiprocessing.spawn(_worker, args=(free_port, kind, "cuda"), nprocs=2)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
