  // Write new K and V rows to their slots in place: the pools are inputs, with const cast away, because
  // an output cannot share their memory. `token` (always 0) orders later readers of the pools, and
  // `previous` orders this write after the previous one. Negative slots are skipped.
  //   k [T, KW] R   v [T, VW] R   k_pool [slots, KW] P   v_pool [slots, VW] P   slots [T] int   token [1] int
  constexpr int KN = KW / VEC, VN = VW / VEC, N = KN > VN ? KN : VN;
  typedef PaVec<R, VEC> From;
  typedef PaVec<P, VEC> To;
  const int row = PA_THREAD / N, at = PA_THREAD % N;
  const int slot = row < slots_shape[0] ? slots[row] : -1;
  if (slot >= 0 && at < KN) {
    const From from = ((const PA_DEVICE From*)k)[(size_t)row * KN + at];
    To to;
    PA_UNROLL for (int e = 0; e < VEC; e++) to.e[e] = P(float(from.e[e]));
    ((PA_DEVICE To*)k_pool)[(size_t)slot * KN + at] = to;
  }
  if (slot >= 0 && at < VN) {
    const From from = ((const PA_DEVICE From*)v)[(size_t)row * VN + at];
    To to;
    PA_UNROLL for (int e = 0; e < VEC; e++) to.e[e] = P(float(from.e[e]));
    ((PA_DEVICE To*)v_pool)[(size_t)slot * VN + at] = to;
  }
  if (PA_THREAD == 0) token[0] = 0;
