  // The input of a drafting head: the RMS norm (https://arxiv.org/abs/1910.07467) of a row of a table beside
  // that of a hidden state. Two threadgroups for each row.
  //   table [n, D] T   ids [rows, COLUMNS] int, of which the last column counts   hidden [rows, D] T
  //   table_weight, hidden_weight [D] W
  //   EPSILON: a float's bits   out [rows, 2 D] T
  constexpr int THREADS = NSG * 32, VECTORS = D / VEC, EACH = (VECTORS + THREADS - 1) / THREADS;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<W, VEC> Weights;
  const int lane = PA_LANE, group = PA_SIMD, index = group * 32 + lane;
  const int row = PA_X / 2, part = PA_X % 2;
  const size_t first = (size_t)PA_X * VECTORS;
  const PA_DEVICE Vec* x = (const PA_DEVICE Vec*)table + (size_t)ids[row * COLUMNS + COLUMNS - 1] * VECTORS;
  const PA_DEVICE Weights* by = (const PA_DEVICE Weights*)table_weight;
  if (part) {
    x = (const PA_DEVICE Vec*)hidden + (size_t)row * VECTORS;
    by = (const PA_DEVICE Weights*)hidden_weight;
  }
  Vec kept[EACH];
  Weights factors[EACH];
  float squares = 0.0f;
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + index;
    if (at < VECTORS) {
      factors[i] = by[at];
      kept[i] = x[at];
      PA_UNROLL for (int e = 0; e < VEC; e++) squares += float(kept[i].e[e]) * float(kept[i].e[e]);
    }
  }
