  // The products of rows with the first matrices of their adapters: a threadgroup computes EACH of a row.
  //   x [rows, IN] T   a [slots, N, IN] A   slots [rows] int: 0 is no adapter   out [rows, N] float
  constexpr int THREADS = NSG * 32, VECTORS = IN / VEC, GROUPS = N / EACH;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<A, VEC> Matrix;
  const int lane = PA_LANE, group = PA_SIMD;
  const int row = PA_X / GROUPS, first = PA_X % GROUPS * EACH;
  const int slot = slots[row];
  float sums[EACH];
  PA_UNROLL for (int i = 0; i < EACH; i++) sums[i] = 0.0f;
  if (slot > 0) {
    const PA_DEVICE Vec* from = (const PA_DEVICE Vec*)x + (size_t)row * VECTORS;
    const PA_DEVICE Matrix* by = (const PA_DEVICE Matrix*)a + ((size_t)slot * N + first) * VECTORS;
    for (int at = group * 32 + lane; at < VECTORS; at += THREADS) {
      const Vec values = from[at];
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const Matrix factors = by[(size_t)i * VECTORS + at];
        PA_UNROLL for (int e = 0; e < VEC; e++) sums[i] += float(values.e[e]) * float(factors.e[e]);
      }
    }
  }
  PA_SHARED(float, partial, NSG * EACH);
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sums[i] += PA_XOR(sums[i], mask);
    if (lane == 0) partial[group * EACH + i] = sums[i];
  }
  PA_SYNC();
  if (group == 0 && lane < EACH) {
    float sum = 0.0f;
    PA_UNROLL for (int s = 0; s < NSG; s++) sum += partial[s * EACH + lane];
    out[(size_t)row * N + first + lane] = sum;
  }
