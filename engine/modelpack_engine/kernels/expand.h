  // The sum of a product's parts and of what a row's adapter adds to it; each thread computes one vector.
  //   given [PARTS, rows, OUT] J   inner [rows, N] float: RANK of each layer   b [slots, RANK, OUT] A
  //   slots [rows] int: 0 is no adapter   out [rows, OUT] T   END0, END1: where the outputs of layers end
  typedef PaVec<T, VEC> To;
  typedef PaVec<J, VEC> Given;
  typedef PaVec<A, VEC> Matrix;
  constexpr int EACH = OUT / VEC;
  const int row = PA_THREAD / EACH, at = PA_THREAD % EACH;
  if (row < slots_shape[0]) {
    const size_t here = (size_t)row * EACH + at, before = (size_t)slots_shape[0] * EACH;
    float sum[VEC];
    PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] = 0.0f;
    PA_UNROLL for (int part = 0; part < PARTS; part++) {
      const Given y = ((const PA_DEVICE Given*)given)[part * before + here];
      PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] += float(y.e[e]);
    }
    const int slot = slots[row];
    if (slot > 0) {
      const int layer = (at * VEC >= END0) + (at * VEC >= END1);
      const size_t from = (size_t)row * N + layer * RANK;
      const PA_DEVICE Matrix* by = (const PA_DEVICE Matrix*)b + (size_t)slot * RANK * EACH + at;
      for (int first = 0; first < RANK; first += 8) {
        PA_UNROLL for (int i = 0; i < 8; i++) {
          const Matrix factors = by[(size_t)(first + i) * EACH];
          const float value = inner[from + first + i];
          PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] += value * float(factors.e[e]);
        }
      }
    }
    To y;
    PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = T(sum[e]);
    ((PA_DEVICE To*)out)[here] = y;
  }
