  // A residual sum and the RMS norm of it (https://arxiv.org/abs/1910.07467): one threadgroup for each row.
  //   a [rows, ..., D] T   b [PARTS, rows, D] B   weight [D] W   EPSILON: a float's bits
  //   total [rows, D] T = a + sum of b   out [rows, D] T = total / rms(total) * weight
  // After `shrink` and `expand`, which have waited, the rows' adapters add to the sum of b.
#ifndef PA_EXPANDED
  PA_LET_NEXT_START();
  PA_WAIT_FOR_BEFORE();
#endif
  constexpr int THREADS = NSG * 32, VECTORS = D / VEC, EACH = (VECTORS + THREADS - 1) / THREADS;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<W, VEC> Weights;
  typedef PaVec<B, VEC> Parts;
  const int lane = PA_LANE, group = PA_SIMD, index = group * 32 + lane;
  const size_t first = (size_t)PA_X * VECTORS;
  const size_t before = (size_t)a_shape[0] * VECTORS;  // vectors in one part
  Vec kept[EACH];
  Weights factors[EACH];
  float squares = 0.0f;
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + index;
    if (at < VECTORS) {
      factors[i] = ((const PA_DEVICE Weights*)weight)[at];  // now, as all wait for one another below
      const Vec x = ((const PA_DEVICE Vec*)a)[first + at];
      float sum[VEC];
      PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] = 0.0f;
      PA_UNROLL for (int part = 0; part < PARTS; part++) {
        const Parts y = ((const PA_DEVICE Parts*)b)[part * before + first + at];
        PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] += float(y.e[e]);
      }
#ifdef PA_EXPANDED
      PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] += changes[i][0][e];
#endif
      PA_UNROLL for (int e = 0; e < VEC; e++) {
        kept[i].e[e] = T(float(x.e[e]) + float(T(sum[e])));
        squares += float(kept[i].e[e]) * float(kept[i].e[e]);
      }
      ((PA_DEVICE Vec*)total)[first + at] = kept[i];
    }
  }
