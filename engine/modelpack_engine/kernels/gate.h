  // Elementwise functions of rows, which may be sums of parts: SQUARED, the square of what is positive; GATED, the
  // product with the sigmoid of a gate. ADDS adds other rows. A thread computes one vector.
  //   x [PARTS, rows, N] B   gate [rows, WIDTH] T: that of column c is c / D * STRIDE + c % D * EACH columns after AT
  //   given [rows, N] T   out [rows, N] T
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<B, VEC> Part;
  constexpr int COLUMNS = N / VEC;
  const int row = PA_THREAD / COLUMNS, at = PA_THREAD % COLUMNS, rows = given_shape[0];
  if (row < rows) {
    float sums[VEC];
    PA_UNROLL for (int e = 0; e < VEC; e++) sums[e] = 0.0f;
    for (int p = 0; p < PARTS; p++) {
      const Part part = ((const PA_DEVICE Part*)x)[((size_t)p * rows + row) * COLUMNS + at];
      PA_UNROLL for (int e = 0; e < VEC; e++) sums[e] += float(part.e[e]);
    }
    Vec y = ((const PA_DEVICE Vec*)given)[(size_t)row * COLUMNS + at];
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      const int c = at * VEC + e;
      float value = sums[e];
      if (SQUARED) value = value > 0.0f ? value * value : 0.0f;
      if (GATED) {
        const float g = float(gate[(size_t)row * WIDTH + AT + c / D * STRIDE + c % D * EACH]);
        value /= 1.0f + PA_EXP2(-1.44269504f * g);
      }
      y.e[e] = T((ADDS ? float(y.e[e]) : 0.0f) + value);
    }
    ((PA_DEVICE Vec*)out)[(size_t)row * COLUMNS + at] = y;
  }
