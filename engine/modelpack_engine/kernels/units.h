  // What the texts of strips.h have in common: a row's inputs in units, each of which a warp multiplies at a time.
  constexpr int UNIT = 256, UNITS = D / UNIT;
  constexpr bool KEPT = UNITS <= WARPS;  // a warp multiplies the same inputs always
  typedef PaVec<T, 8> Eight;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  const int lane = PA_LANE, warp = PA_SIMD, r = lane / 4, c = lane % 4;
