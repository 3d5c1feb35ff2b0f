  // In place of `shrink`: another kernel has computed the products.
  //   products [rows, N] float   slots [rows] int: 0 is no adapter
#ifdef PA_CHUNKS
  const int own_row = block;
#else
  const int own_row = PA_X, product = 0;
#endif
#define PA_SHRUNK
  constexpr int STEP = 8;
  const int own_thread = PA_SIMD * 32 + PA_LANE, slot = slots[own_row];
  PA_SHARED(float, inner, RANKS);
  for (int i = own_thread; i < RANKS; i += NSG * 32) inner[i] = products[(size_t)own_row * N + product + i];
  PA_SYNC();
