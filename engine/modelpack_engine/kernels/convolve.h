  // Short causal convolutions of each channel, for the rows of several sequences; a thread takes V
  // channels of a row, or of a row of a state. `segments` is `Segments.runs` of attention/metadata.py.
  //   x [SKIP + rows, WIDTH] T   columns [C / V] int: the first of V columns of x   weight [C, K] E   bias [C] E, if BIAS
  //   state [states, K - 1, C] T: the rows before and after segments   pool [slots, K - 1, C] T; both are written in place
  //   segments [segments, 6] int   owners [rows] int
  //   y [rows, C] T, its SiLU if ACTIVATE
  constexpr int N = C / V, KEEP = K - 1;
  typedef PaVec<T, V> Vec;
  const int item = PA_THREAD / N, at = PA_THREAD % N, rows = owners_shape[0];
  const PA_DEVICE T* const column = x + (size_t)SKIP * WIDTH + columns[at];
  if (item < rows) {
    const int owner = owners[item];
    float sums[V], taps[V * K];
    PA_UNROLL for (int e = 0; e < V; e++) sums[e] = 0.0f;
    PA_UNROLL for (int k = 0; k < K; k++) {
      const PaVec<E, V> some = ((const PA_DEVICE PaVec<E, V>*)weight)[at * K + k];
      PA_UNROLL for (int e = 0; e < V; e++) taps[k * V + e] = float(some.e[e]);
    }
    if (owner >= 0) {
      const int source = segments[owner * 6], before = item - segments[owner * 6 + 1];
      const PA_DEVICE Vec* const rows_of_state = (const PA_DEVICE Vec*)(source < -1 ? pool : state);
      const size_t from = source < -1 ? -2 - source : source;
      PA_UNROLL for (int k = 0; k < K; k++) {
        const int back = KEEP - k;
        if (back <= before || source != -1) {
          const Vec in = back <= before ? *(const PA_DEVICE Vec*)(column + (size_t)(item - back) * WIDTH)
                                        : rows_of_state[(from * KEEP + KEEP + before - back) * N + at];
          PA_UNROLL for (int e = 0; e < V; e++) {
            sums[e] += float(in.e[e]) * taps[e * K + k];
          }
        }
      }
    }
    Vec out;
    PA_UNROLL for (int e = 0; e < V; e++) {
      const float sum = sums[e] + (BIAS && owner >= 0 ? float(bias[at * V + e]) : 0.0f);
      out.e[e] = T(ACTIVATE ? sum / (1.0f + PA_EXP2(-1.44269504f * sum)) : sum);
    }
    ((PA_DEVICE Vec*)y)[(size_t)item * N + at] = out;
  } else if (item - rows < segments_shape[0] * KEEP) {
    const int cell = item - rows, segment = cell / KEEP;
    const int source = segments[segment * 6], first = segments[segment * 6 + 1];
    const int marked = segments[segment * 6 + 3], slot = segments[segment * 6 + 4], to = segments[segment * 6 + 5];
    const PA_DEVICE Vec* const rows_of_state = (const PA_DEVICE Vec*)(source < -1 ? pool : state);
    const size_t from = source < -1 ? -2 - source : source;
    PA_UNROLL for (int i = 0; i < 2; i++) {  // after all rows, and after the marked one
      const int count = i ? marked : segments[segment * 6 + 2], row = count - KEEP + cell % KEEP;
      if (count >= i) {
        Vec kept;
        PA_UNROLL for (int e = 0; e < V; e++) kept.e[e] = T(0.0f);
        if (row >= 0) {
          kept = *(const PA_DEVICE Vec*)(column + (size_t)(first + row) * WIDTH);
        } else if (source != -1) {
          kept = rows_of_state[(from * KEEP + KEEP + row) * N + at];
        }
        ((PA_DEVICE Vec*)(i ? pool : state))[((size_t)(i ? slot : to) * KEEP + cell % KEEP) * N + at] = kept;
      }
    }
  }
