  // The products of a row and RANKS columns of its adapter's first matrix, which `shrink` computes before.
  //   out [rows, N] float; undefined for rows without an adapter
  if (own_thread < RANKS && slot > 0) out[(size_t)own_row * N + product + own_thread] = inner[own_thread];
