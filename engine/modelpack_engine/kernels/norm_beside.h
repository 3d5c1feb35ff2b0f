  // The input of a drafting head: the RMS norm (https://arxiv.org/abs/1910.07467) of a row of a table beside
  // that of a hidden state. Two threadgroups for each row.
  //   table [n, D] T   index [rows, COLUMNS] int, of which the last column counts   hidden [rows, D] T   table_weight, hidden_weight [D] W
  //   EPSILON: a float's bits   out [rows, 2 D] T
  constexpr int THREADS = NSG * 32, VECTORS = D / VEC, EACH = (VECTORS + THREADS - 1) / THREADS;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<W, VEC> Weights;
  const int lane = PA_LANE, group = PA_SIMD, first = group * 32 + lane;
  const int row = PA_X / 2, part = PA_X % 2;
  const PA_DEVICE Vec* x = (const PA_DEVICE Vec*)table + (size_t)index[row * COLUMNS + COLUMNS - 1] * VECTORS;
  const PA_DEVICE Weights* by = (const PA_DEVICE Weights*)table_weight;
  if (part) {
    x = (const PA_DEVICE Vec*)hidden + (size_t)row * VECTORS;
    by = (const PA_DEVICE Weights*)hidden_weight;
  }
  Vec kept[EACH];
  Weights factors[EACH];
  float squares = 0.0f;
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + first;
    if (at < VECTORS) {
      factors[i] = by[at];
      kept[i] = x[at];
      PA_UNROLL for (int e = 0; e < VEC; e++) squares += float(kept[i].e[e]) * float(kept[i].e[e]);
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
  PA_SHARED(float, partial, NSG);
  if (lane == 0) partial[group] = squares;
  PA_SYNC();
  squares = 0.0f;
  PA_UNROLL for (int s = 0; s < NSG; s++) squares += partial[s];
  const float factor = PA_RSQRT(squares / D + pa_float(EPSILON));
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + first;
    if (at < VECTORS) {
      Vec y;
      PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = T(float(kept[i].e[e]) * factor * float(factors[i].e[e]));
      ((PA_DEVICE Vec*)out)[(size_t)PA_X * VECTORS + at] = y;
    }
  }
