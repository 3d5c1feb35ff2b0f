  // The gated delta rule (https://arxiv.org/abs/2412.06464), token by token: a simdgroup takes R rows
  // of a head's state, which stay in registers, each lane some of a row's DK elements.
  //   q, k [batch, tokens, HK, DK] T   v [batch, tokens, HV, DV] T   beta [batch, tokens, HV] float
  //   g [batch, tokens, HV] float, or one for each of DK (EVERY)   state [batch, HV, DV, DK] float
  //   y [batch, tokens, HV, DV] T   new_state: after the last token
  constexpr int EACH = DK / 32, UNITS = DV / R;
  typedef PaVec<T, EACH> Vec;
  typedef PaVec<float, EACH> State;
  const int lane = PA_LANE, unit = PA_X * NSG + PA_SIMD;
  const int cell = unit / UNITS, item = cell / HV, head = cell % HV, first = unit % UNITS * R;
  if (item < v_shape[0]) {
    const int tokens = v_shape[1];
    State s[R];
    PA_UNROLL for (int r = 0; r < R; r++) {
      s[r] = ((const PA_DEVICE State*)state)[((size_t)cell * DV + first + r) * 32 + lane];
    }
    for (int t = 0; t < tokens; t++) {
      const size_t token = (size_t)item * tokens + t, at = token * HV + head;
      const size_t of_key = (token * HK + head / (HV / HK)) * 32 + lane;
      const Vec key = ((const PA_DEVICE Vec*)k)[of_key];
      const Vec query = ((const PA_DEVICE Vec*)q)[of_key];
      const float rate = beta[at];
      State decay;
      PA_UNROLL for (int e = 0; e < EACH; e++) {
        decay.e[e] = EVERY ? g[(at * 32 + lane) * EACH + e] : g[at];
      }
      float known[R], sums[R];
      PA_UNROLL for (int r = 0; r < R; r++) {
        known[r] = 0.0f;
        PA_UNROLL for (int e = 0; e < EACH; e++) {
          s[r].e[e] *= decay.e[e];
          known[r] += s[r].e[e] * float(key.e[e]);
        }
      }
      PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) known[r] += PA_XOR(known[r], mask);
      }
      PA_UNROLL for (int r = 0; r < R; r++) {
        const float change = (float(v[at * DV + first + r]) - known[r]) * rate;
        sums[r] = 0.0f;
        PA_UNROLL for (int e = 0; e < EACH; e++) {
          s[r].e[e] += float(key.e[e]) * change;
          sums[r] += s[r].e[e] * float(query.e[e]);
        }
      }
      PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) sums[r] += PA_XOR(sums[r], mask);
      }
      if (lane == 0) {
        PA_UNROLL for (int r = 0; r < R; r++) y[at * DV + first + r] = T(sums[r]);
      }
    }
    PA_UNROLL for (int r = 0; r < R; r++) {
      ((PA_DEVICE State*)new_state)[((size_t)cell * DV + first + r) * 32 + lane] = s[r];
    }
  }
