  // Linear attention, token by token: the state of a head maps keys to values, and decays. LANES lanes
  // share a row of the state, for one element of a value, and hold R rows in registers.
  // `segments` is `Segments.runs` of attention/metadata.py.
  //   q, k [rows, H, DK] T   v [rows, H, DV] T   decay [rows, H, DK] D, or [H] unless EVERY
  //   a, b [rows, H, DK] T, if CORRECTED (RWKV-7, https://arxiv.org/abs/2503.14456)
  //   state [states, H, DV, DK] S, or [states, H, DK, DV] if TURNED   pool [slots, …] S; both are written in place
  //   segments [segments, 6] int   owners [rows] int
  //   y [rows, H, DV] T
  // For each row: state = decay state + v k + (state a) b, of which y = state q.
  constexpr int LANES = 4, EACH = DK / LANES, ROWS = 32 / LANES * R, UNITS = (DV + ROWS - 1) / ROWS;
  const int unit = PA_X * NSG + PA_SIMD, part = PA_LANE % LANES;
  const int cell = unit / UNITS, segment = cell / H, head = cell % H;
  const int first = unit % UNITS * ROWS + PA_LANE / LANES;  // rows are 32 / LANES apart
  const int source = segment < segments_shape[0] ? segments[segment * 6] : -1;
  const int start = segment < segments_shape[0] ? segments[segment * 6 + 1] : 0;
  const int count = segment < segments_shape[0] ? segments[segment * 6 + 2] : -1;
  constexpr int TO_ROW = TURNED ? 1 : DK, TO_KEY = TURNED ? DV : 1;
  const int at_state = first * TO_ROW + part * EACH * TO_KEY;
  if (count >= 0) {
    const int marked = segments[segment * 6 + 3], slot = segments[segment * 6 + 4];
    const size_t after = ((size_t)segments[segment * 6 + 5] * H + head) * DV * DK + at_state;
    const PA_DEVICE S* const before = source < -1 ? pool : state;
    const size_t from = ((source < -1 ? -2 - source : source) * (size_t)H + head) * DV * DK + at_state;
    float s[R][EACH];
    PA_UNROLL for (int r = 0; r < R; r++) {
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const bool there = source != -1 && first + r * 32 / LANES < DV;
        s[r][i] = there ? float(before[from + r * 32 / LANES * TO_ROW + i * TO_KEY]) : 0.0f;
      }
    }
    for (int t = 0; t < count; t++) {
      const size_t row = ((size_t)start + t) * H + head, keys = row * DK + part * EACH;
      float value[R], known[R], sums[R];
      PA_UNROLL for (int r = 0; r < R; r++) {
        const int column = first + r * 32 / LANES;
        value[r] = column < DV ? float(v[row * DV + column]) : 0.0f;
        known[r] = sums[r] = 0.0f;
      }
      PA_UNROLL for (int i = 0; i < (CORRECTED ? EACH : 0); i++) {
        const float by = float(a[keys + i]);
        PA_UNROLL for (int r = 0; r < R; r++) known[r] += s[r][i] * by;
      }
      PA_UNROLL for (int mask = CORRECTED ? LANES / 2 : 0; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) known[r] += PA_XOR(known[r], mask);
      }
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const float kept = float(decay[EVERY ? keys + i : head]), key = float(k[keys + i]), query = float(q[keys + i]);
        const float change = CORRECTED ? float(b[keys + i]) : 0.0f;
        PA_UNROLL for (int r = 0; r < R; r++) {
          s[r][i] = s[r][i] * kept + value[r] * key + known[r] * change;
          sums[r] += s[r][i] * query;
        }
      }
      PA_UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) sums[r] += PA_XOR(sums[r], mask);
      }
      PA_UNROLL for (int r = 0; r < R; r++) {
        const int column = first + r * 32 / LANES;
        if (part == 0 && column < DV) y[row * DV + column] = T(sums[r]);
      }
      if (t + 1 == marked) {
        const size_t to = ((size_t)slot * H + head) * DV * DK + at_state;
        PA_UNROLL for (int r = 0; r < R; r++) {
          PA_UNROLL for (int i = 0; i < EACH; i++) {
            const size_t at = to + r * 32 / LANES * TO_ROW + i * TO_KEY;
            if (first + r * 32 / LANES < DV) ((PA_DEVICE S*)pool)[at] = S(s[r][i]);
          }
        }
      }
    }
    PA_UNROLL for (int r = 0; r < R; r++) {
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const size_t at = after + r * 32 / LANES * TO_ROW + i * TO_KEY;
        if (first + r * 32 / LANES < DV) ((PA_DEVICE S*)state)[at] = S(s[r][i]);
      }
    }
  } else if (segment == segments_shape[0]) {  // rows without a segment
    for (int row = PA_LANE; row < owners_shape[0]; row += 32) {
      const int column = unit % UNITS * ROWS;
      if (owners[row] < 0) {
        for (int i = column; i < column + ROWS && i < DV; i++) y[((size_t)row * H + head) * DV + i] = T(0.0f);
      }
    }
  }
