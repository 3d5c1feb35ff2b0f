  // Rotate queries and keys of a picture's patches, and gather them and the values in windows; each thread
  // has VEC pairs of elements, of which one is in each half of a head.
  //   joint [rows, 3, H, D] T: queries, keys and values   angles [rows, D] float: cosines, then sines
  //   index [n] int: a row for each place   out [3, n, H, D] T
  typedef PaVec<T, VEC> Vec;
  constexpr int HALF = D / 2, RUNS = HALF / VEC, EACH = 3 * H * RUNS;
  const int place = PA_THREAD / EACH, run = PA_THREAD % RUNS, head = PA_THREAD / RUNS % H;
  const int kind = PA_THREAD / (RUNS * H) % 3;  // query, key, value
  if (place < index_shape[0]) {
    const int row = index[place];
    const PA_DEVICE T* from = joint + (((size_t)row * 3 + kind) * H + head) * D + run * VEC;
    Vec first = *(const PA_DEVICE Vec*)from, second = *(const PA_DEVICE Vec*)(from + HALF);
    const PA_DEVICE float* at = angles + (size_t)row * D + run * VEC;
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      const float x = float(first.e[e]), y = float(second.e[e]);
      if (kind < 2) {
        first.e[e] = T(x * at[e] - y * at[HALF + e]);
        second.e[e] = T(y * at[e] + x * at[HALF + e]);
      }
    }
    PA_DEVICE T* to = out + (((size_t)kind * index_shape[0] + place) * H + head) * D + run * VEC;
    *(PA_DEVICE Vec*)to = first;
    *(PA_DEVICE Vec*)(to + HALF) = second;
  }
