  // Gather rows of a table; each thread copies one vector.
  //   table [n, D] T   index [rows] int   out [rows, D] T
  typedef PaVec<T, VEC> Vec;
  constexpr int EACH = D / VEC;
  const int row = PA_THREAD / EACH, at = PA_THREAD % EACH;
  if (row < index_shape[0]) {
    ((PA_DEVICE Vec*)out)[(size_t)row * EACH + at] =
        ((const PA_DEVICE Vec*)table)[(size_t)index[row] * EACH + at];
  }
