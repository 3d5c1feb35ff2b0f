  // Cosines and sines of positions times inverse frequencies; each thread computes one of each.
  //   positions [rows] int   inverse [HALF] float   out [rows, HALF, 2] float   FACTOR: a float's bits
  const int row = PA_THREAD / HALF, at = PA_THREAD % HALF;
  if (row < positions_shape[0]) {
    const float angle = float(positions[row]) * inverse[at];
    out[2 * (size_t)PA_THREAD] = PA_COS(angle) * pa_float(FACTOR);
    out[2 * (size_t)PA_THREAD + 1] = PA_SIN(angle) * pa_float(FACTOR);
  }
