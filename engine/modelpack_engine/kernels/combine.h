  // The sum of a row's expert outputs times their scores; each thread computes one vector.
  //   given [rows * K, D] T: sorted by expert   place [rows * K] int: the index of each pair in given
  //   scores [rows, K] S   out [rows, D] O   R: the type that products are rounded to
  typedef PaVec<T, VEC> From;
  typedef PaVec<O, VEC> To;
  constexpr int EACH = D / VEC;
  const int row = PA_THREAD / EACH, at = PA_THREAD % EACH;
  if (row < scores_shape[0]) {
    float sum[VEC];
    PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] = 0.0f;
    for (int k = 0; k < K; k++) {
      const int pair = row * K + k;
      const From x = ((const PA_DEVICE From*)given)[(size_t)place[pair] * EACH + at];
      const float score = float(scores[pair]);
      PA_UNROLL for (int e = 0; e < VEC; e++) sum[e] += float(R(float(x.e[e]) * score));
    }
    To y;
    PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = O(float(R(sum[e])));
    ((PA_DEVICE To*)out)[(size_t)row * EACH + at] = y;
  }
