  // The parts of a split decode become one row. A threadgroup of NSG simdgroups serves one head.
  //   partial [B, HQ, parts, DV] float   stats [B, HQ, parts, 2] float   sinks [HQ] S
  //   out [B, HQ, DV] T
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  const int head = PA_X, row = PA_Y, parts = stats_shape[2];
  const size_t here = (size_t)row * HQ + head;

  float highest = LOWEST, whole = 0.0f;
  for (int p = 0; p < parts; p++) {
    const float top = stats[(here * parts + p) * 2];
    highest = top > highest ? top : highest;
  }
  if (SINKS) {
    const float sink = float(sinks[head]) * LOG2E;
    highest = sink > highest ? sink : highest;
    whole = PA_EXP2(sink - highest);
  }
  for (int p = 0; p < parts; p++) {
    whole += stats[(here * parts + p) * 2 + 1] * PA_EXP2(stats[(here * parts + p) * 2] - highest);
  }
  for (int d = PA_SIMD * 32 + PA_LANE; d < DV; d += NSG * 32) {
    float o = 0.0f;
    for (int p = 0; p < parts; p++) {
      o += partial[(here * parts + p) * DV + d] * PA_EXP2(stats[(here * parts + p) * 2] - highest);
    }
    out[here * DV + d] = T(whole > 0.0f ? o / whole : 0.0f);
  }
