  // Merge the parts of a split decode into one row. A threadgroup merges one head: its NSG simdgroups
  // read the parts in turn, and their lanes the elements.
  //   partial [B, HQ, parts, DV] float   stats [B, HQ, parts, 2] float   sinks [HQ] S
  //   out [B, HQ, DV] T
  PA_LET_NEXT_START();
  PA_WAIT_FOR_BEFORE();
  constexpr int DN = (DV + 31) / 32;
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  const int head = PA_X, row = PA_Y, lane = PA_LANE, group = PA_SIMD, parts = stats_shape[2];
  const size_t here = ((size_t)row * HQ + head) * parts;

  float highest = LOWEST, whole = 0.0f;
  for (int p = lane; p < parts; p += 32) {
    const float top = stats[(here + p) * 2];
    highest = top > highest ? top : highest;
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float other = PA_XOR(highest, mask);
    highest = other > highest ? other : highest;
  }
  const float sink = SINKS ? float(sinks[head]) * LOG2E : LOWEST;
  highest = sink > highest ? sink : highest;
  for (int p = lane; p < parts; p += 32) {
    whole += stats[(here + p) * 2 + 1] * PA_EXP2(stats[(here + p) * 2] - highest);
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) whole += PA_XOR(whole, mask);
  if (SINKS) whole += PA_EXP2(sink - highest);

  float o[DN];
  PA_UNROLL for (int i = 0; i < DN; i++) o[i] = 0.0f;
  for (int p = group; p < parts; p += NSG) {
    const float weight = PA_EXP2(stats[(here + p) * 2] - highest);
    PA_UNROLL for (int i = 0; i < DN; i++) {
      const int d = i * 32 + lane;
      if (d < DV) o[i] += partial[(here + p) * DV + d] * weight;
    }
  }
  PA_SHARED(float, sums, NSG * DN * 32);
  PA_UNROLL for (int i = 0; i < DN; i++) sums[(group * DN + i) * 32 + lane] = o[i];
  PA_SYNC();
  for (int d = group * 32 + lane; d < DV; d += NSG * 32) {
    float total = 0.0f;
    PA_UNROLL for (int s = 0; s < NSG; s++) total += sums[s * DN * 32 + d];
    out[((size_t)row * HQ + head) * DV + d] = T(whole > 0.0f ? total / whole : 0.0f);
  }
