  // Gather rows of a table, the same ones of each part; each thread copies one vector.
  //   table [parts, n, D] T   index [rows] int   out [parts, rows, D] T
  typedef PaVec<T, VEC> Vec;
  constexpr int EACH = D / VEC;
  const int line = PA_THREAD / EACH, at = PA_THREAD % EACH, rows = index_shape[0];
  if (line < rows * table_shape[0]) {
    const size_t from = (size_t)(line / rows) * table_shape[1] + index[line % rows];
    ((PA_DEVICE Vec*)out)[(size_t)line * EACH + at] =
        ((const PA_DEVICE Vec*)table)[from * EACH + at];
  }
