// The barriers of post_res_project_pre and nothing else: role 0 (256 threads) reads what role 1 (128 threads) wrote, a third role (128) only takes part
// in __syncthreads. ARRIVE: the writer does not wait. Right by PTX: bar.arrive / bar.sync order the writes before, all of them the reads after.
#include <cstdio>
#ifndef ARRIVE
#define ARRIVE 0
#endif
__global__ void roles(float *out, int steps) {
  __shared__ float pre[128];
  float sum = 0;
  for (int i = 0; i < steps; ++i) {
    __syncthreads();
    if (threadIdx.x < 256) {
      asm volatile("bar.sync 3, 384;" ::: "memory");
      sum += pre[threadIdx.x / 2];
    } else if (threadIdx.x < 384) {
      __nanosleep(100);
    } else {
      pre[threadIdx.x - 384] = i + threadIdx.x;
#if ARRIVE
      asm volatile("bar.arrive 3, 384;" ::: "memory");
#else
      asm volatile("bar.sync 3, 384;" ::: "memory");
#endif
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
int main() {
  float *out; cudaMalloc(&out, 4 * 512 * 132);
  roles<<<132, 512>>>(out, 8);
  cudaError_t e = cudaDeviceSynchronize();
  float h[512]; cudaMemcpy(h, out, sizeof h, cudaMemcpyDeviceToHost);
  printf("%s, sum of thread 0: %g (wanted %g)\n", cudaGetErrorString(e), h[0], 8 * 384 + 28.0);
}
