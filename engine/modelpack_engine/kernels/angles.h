  // Cosines and sines of positions times inverse frequencies; each thread computes one of each.
  //   first, second, third [rows] int: positions on three axes   axis_of [HALF] int: 0, 1 or 2
  //   inverse [HALF] float   out [rows, HALF, 2] float   FACTOR: a float's bits
  const int row = PA_THREAD / HALF, at = PA_THREAD % HALF;
  if (row < first_shape[0]) {
    const int axis = axis_of[at];
    const int position = axis == 0 ? first[row] : axis == 1 ? second[row] : third[row];
    const float angle = float(position) * inverse[at];
    out[2 * (size_t)PA_THREAD] = PA_COS(angle) * pa_float(FACTOR);
    out[2 * (size_t)PA_THREAD + 1] = PA_SIN(angle) * pa_float(FACTOR);
  }
