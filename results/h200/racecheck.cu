// Four roles that begin every iteration at one barrier of all, as post_res_project_pre with roles 4: the sums write pre[i % 2], give reads
// pre[(i - 1) % 2]. MODE 0: only that. 1: give also has a barrier of its own (bar.sync 5, 128), 2: the sums too (4, 128). 3: as 2, and
// setmaxnreg. 4: as 2, and the sums wait, each thread for a word of another block, before they write; 5: after they have written.
#include <cstdio>
#ifndef MODE
#define MODE 0
#endif
#define BAR(id, n) asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(n) : "memory")
__global__ void __launch_bounds__(640, 1) roles(float *out, unsigned *words, int steps) {
  __shared__ float pre[2][128];
  float sum = 0;
  const int tx = threadIdx.x;
  if (tx < 256) {
#if MODE == 3
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
#endif
    for (int i = 0; i < steps; ++i) { BAR(2, 640); }
  } else if (tx < 384) {
#if MODE == 3
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
#endif
    for (int i = 0; i < steps; ++i) {
      BAR(2, 640);
      if (i >= 2) {
        sum += pre[(i - 1) % 2][(tx - 256) / 16];
#if MODE >= 1
        BAR(5, 128);
#endif
      }
    }
  } else if (tx < 512) {
#if MODE == 3
    asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
#endif
    BAR(2, 640);
    for (int i = 1; i < steps; ++i) { BAR(2, 640); __nanosleep(100); }
  } else {
#if MODE == 3
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
#endif
    BAR(2, 640);
    for (int i = 1; i < steps; ++i) {
      BAR(2, 640);
#if MODE == 4 || MODE == 5
      const int e = tx - 512;
      if ((e * 7 + i + blockIdx.x) % 5 == 0) __nanosleep(500 + e * 8);
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(words + blockIdx.x * 128 + e), "r"(i) : "memory");
#define WAIT { unsigned w; do { asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(words + (blockIdx.x + 1) % gridDim.x * 128 + e) : "memory"); } while (w < i); }
#endif
#if MODE == 4
      WAIT
#endif
      pre[i % 2][tx - 512] = i + tx;
#if MODE == 5
      WAIT
#endif
#if MODE >= 2
      BAR(4, 128);
#endif
    }
  }
  __syncthreads();
  out[blockIdx.x * 640 + tx] = sum;
}
int main() {
  float *out; cudaMalloc(&out, 4 * 640 * 132); unsigned *words; cudaMalloc(&words, 4 * 128 * 132); cudaMemset(words, 0, 4 * 128 * 132);
  roles<<<132, 640>>>(out, words, 40);
  printf("mode %d: %s\n", MODE, cudaGetErrorString(cudaDeviceSynchronize()));
}
