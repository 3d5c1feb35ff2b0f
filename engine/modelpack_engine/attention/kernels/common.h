// What the kernels share on every backend: N elements that travel in one load or store.
template <typename E, int N>
struct alignas(sizeof(E) * N) PaVec {
  E e[N];
};

#ifdef __CUDACC__
__device__ inline float pa_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
