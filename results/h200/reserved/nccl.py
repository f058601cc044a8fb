"""Three chained boundaries beside four all-reduces on two GPUs: ``python nccl.py PORT``; ``MHC_RESERVED_SMS`` and NCCL's apply."""

import os
import statistics
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mhc

T, N, C = 4096, 4, 7168


def body(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    torch.manual_seed(0)
    connections = [mhc.HyperConnection(C, n=N).cuda() for _ in range(3)]
    with torch.no_grad():
        for hc in connections:
            hc.fn.normal_(std=0.02)
            hc.scale.fill_(0.5)
    x = torch.randn(T, N, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    leaves = [x, *(p for hc in connections for p in hc.parameters())]
    blocks = [(hc, torch.nn.Identity()) for hc in connections]
    buffers = [torch.ones(64 << 20, device="cuda") for _ in range(4)]  # 256 MB each

    def step():
        return torch.autograd.grad(mhc.chain(x, blocks), leaves, grad)

    def together():
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(work, beside):
        times, same = [], True
        for _ in range(6):
            begin, end = together()
            reductions = [dist.all_reduce(b, async_op=True) for b in buffers] if beside else []
            begin.record()
            got = work()
            end.record()
            for reduction in reductions:
                reduction.wait()
            torch.cuda.synchronize()
            same &= got is None or all(map(torch.equal, got, want))
            times.append(begin.elapsed_time(end))
        return statistics.median(times), max(times), same

    def reduce_all():
        for reduction in [dist.all_reduce(b, async_op=True) for b in buffers]:
            reduction.wait()

    want = [t.clone() for t in step()]
    reduce_all()
    (alone, worst, same), (beside, worst_beside, same_beside) = timed(step, False), timed(step, True)
    reductions = timed(reduce_all, False)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        reduce_all()
        torch.cuda.synchronize()
    kernels = sorted({k.key[:44] for k in profiler.key_averages() if k.key.startswith(("pre_streams", "streams_grad", "ncclDev"))})
    if rank == 0:
        reserved, ctas = (os.environ.get(name, "-") for name in ("MHC_RESERVED_SMS", "NCCL_MAX_CTAS"))
        print(
            f"reserved {reserved:>3} NCCL_MAX_CTAS {ctas:>3} | alone {alone:.2f} ms (max {worst:.2f}) | beside {beside:.2f}",
            f"(max {worst_beside:.2f}) same bits {same and same_beside} | four all-reduces alone {reductions:.2f} ms | {kernels}",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(body, (int(sys.argv[1]),), nprocs=2)
