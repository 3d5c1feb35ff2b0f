  // The elements of rows in the order in which `packed_wide` multiplies them (order.h); CUDA only.
  //   x [M, D] T   out [D / 64, M, 64] T
  PA_LET_NEXT_START();
  PA_WAIT_FOR_BEFORE();
  const int M = x_shape[0], row = PA_THREAD / (D / 8), k = PA_THREAD % (D / 8) * 8;
  if (row < M) pa_put_in_order<BITS>(out, *(const uint4*)(x + (size_t)row * D + k), k, row, M);
