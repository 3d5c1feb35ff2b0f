  // The gated delta rule (https://arxiv.org/abs/2412.06464), token by token. LANES lanes share a row of
  // a head's state, which stays in registers, and have R rows. `segments` is `Segments.runs` of attention/metadata.py.
  //   q, k [rows, KEYS] T: HK * DK columns from Q_AT and K_AT on   v [rows, VALUES] T: HV * DV from V_AT on
  //   beta [rows, HV] float   If RAW, g and beta are [rows, SCALARS] G, from G_AT and BETA_AT on: heads in
  //   groups of PER, g after beta; g = exp(rates * softplus(g + biases)), and beta = sigmoid(beta).
  //   rates, biases [HV] float   If NORM, keys and queries are divided by their lengths, queries also by
  //   the square root of DK; EPSILON, the bits of a float, is added to the squares of the lengths.
  //   g [rows, HV] float, or one for each of DK (EVERY)   state [states, HV, DV, DK] float
  //   pool [slots, HV, DV, DK] float; both are written in place   segments [segments, 6] int   owners [rows] int
  //   y [rows, HV, DV] T
  constexpr int LANES = 4, VEC = 4, EACH = DK / (LANES * VEC), ROWS = 32 / LANES * R;
  constexpr int UNITS = (DV + ROWS - 1) / ROWS;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<float, VEC> State;
  const int unit = PA_X * NSG + PA_SIMD, part = PA_LANE % LANES;
  const int cell = unit / UNITS, segment = cell / HV, head = cell % HV;
  const int first = unit % UNITS * ROWS + PA_LANE / LANES;  // rows are 32 / LANES apart
  const int source = segment < segments_shape[0] ? segments[segment * 6] : -1;
  const int start = segment < segments_shape[0] ? segments[segment * 6 + 1] : 0;
  const int count = segment < segments_shape[0] ? segments[segment * 6 + 2] : -1;
  const int marked = segment < segments_shape[0] ? segments[segment * 6 + 3] : -1;
  // With WIDE, `delta_wide` computes segments of LONG rows or more that own them.
  const bool is_long = WIDE && count >= LONG && (marked < 0 || marked % 16 == 0) && owners[start] == segment;
  if (count >= 0 && !is_long) {
    const int slot = segments[segment * 6 + 4], to = segments[segment * 6 + 5];
    const PA_DEVICE State* const before = (const PA_DEVICE State*)(source < -1 ? pool : state);
    const size_t from = source < -1 ? -2 - source : source;
    State s[R][EACH];
    PA_UNROLL for (int r = 0; r < R; r++) {
      const int row = first + r * 32 / LANES;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        PA_UNROLL for (int e = 0; e < VEC; e++) s[r][i].e[e] = 0.0f;
        if (source != -1 && row < DV) s[r][i] = before[(((from * HV + head) * DV + row) * EACH + i) * LANES + part];
      }
    }
    Vec key[EACH], query[EACH], next_key[EACH], next_query[EACH];
    float value[R], next_value[R], rate = 0.0f, next_rate = 0.0f, kept = 0.0f, next_kept = 0.0f;
    for (int t = -1; t < count; t++) {
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        key[i] = next_key[i];
        query[i] = next_query[i];
      }
      kept = next_kept;
      rate = next_rate;
      PA_UNROLL for (int r = 0; r < R; r++) value[r] = next_value[r];
      if (t + 1 < count) {  // reads ahead, while the sums below wait for each other
        const size_t token = (size_t)start + t + 1, at = token * HV + head;
        const PA_DEVICE Vec* keys = (const PA_DEVICE Vec*)(k + token * KEYS + K_AT);
        const PA_DEVICE Vec* queries = (const PA_DEVICE Vec*)(q + token * KEYS + Q_AT);
        PA_UNROLL for (int i = 0; i < EACH; i++) {
          const int index = (head / (HV / HK) * EACH + i) * LANES + part;
          next_key[i] = keys[index];
          next_query[i] = queries[index];
        }
        if (RAW) {
          const size_t column = token * SCALARS + head / PER * 2 * PER + head % PER;
          const float raw = float(g[column + G_AT]) + biases[head], low = raw > 0.0f ? -raw : raw;
          const float passed = (raw > 0.0f ? raw : 0.0f) + PA_LOG(1.0f + PA_EXP2(1.44269504f * low));
          next_kept = PA_EXP2(1.44269504f * rates[head] * passed);
          next_rate = 1.0f / (1.0f + PA_EXP2(-1.44269504f * float(beta[column + BETA_AT])));
        } else {
          next_kept = EVERY ? 0.0f : float(g[at]);
          next_rate = float(beta[at]);
        }
        PA_UNROLL for (int r = 0; r < R; r++) {
          const int row = first + r * 32 / LANES;
          next_value[r] = row < DV ? float(v[token * VALUES + V_AT + head * DV + row]) : 0.0f;
        }
      }
      if (t < 0) continue;
      const size_t at = ((size_t)start + t) * HV + head;
      float known[R], sums[R], lengths[2] = {0.0f, 0.0f}, by_key = 1.0f, by_query = 1.0f;
      PA_UNROLL for (int r = 0; r < R; r++) known[r] = sums[r] = 0.0f;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        PA_UNROLL for (int e = 0; e < VEC; e++) {
          const float x = float(key[i].e[e]), y = float(query[i].e[e]);
          const float decay = EVERY ? float(g[((at * EACH + i) * LANES + part) * VEC + e]) : kept;
          PA_UNROLL for (int r = 0; r < R; r++) {
            s[r][i].e[e] *= decay;
            known[r] += s[r][i].e[e] * x;
          }
          if (NORM) {
            lengths[0] += x * x;
            lengths[1] += y * y;
          }
        }
      }
      PA_UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) known[r] += PA_XOR(known[r], mask);
        PA_UNROLL for (int i = 0; i < (NORM ? 2 : 0); i++) lengths[i] += PA_XOR(lengths[i], mask);
      }
      if (NORM) {
        by_key = PA_RSQRT(lengths[0] + pa_float(EPSILON));
        by_query = PA_RSQRT((lengths[1] + pa_float(EPSILON)) * DK);
      }
      PA_UNROLL for (int r = 0; r < R; r++) known[r] = (value[r] - known[r] * by_key) * rate * by_key;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        PA_UNROLL for (int e = 0; e < VEC; e++) {
          const float x = float(key[i].e[e]), y = float(query[i].e[e]);
          PA_UNROLL for (int r = 0; r < R; r++) {
            s[r][i].e[e] += x * known[r];
            sums[r] += s[r][i].e[e] * y;
          }
        }
      }
      PA_UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) sums[r] += PA_XOR(sums[r], mask);
      }
      PA_UNROLL for (int r = 0; r < R; r++) {
        const int row = first + r * 32 / LANES;
        if (part == 0 && row < DV) y[at * DV + row] = T(sums[r] * by_query);
      }
      if (t + 1 == marked) {
        PA_UNROLL for (int r = 0; r < R; r++) {
          const int row = first + r * 32 / LANES;
          PA_UNROLL for (int i = 0; i < EACH; i++) {
            const size_t at = (((size_t)slot * HV + head) * DV + row) * EACH + i;
            if (row < DV) ((PA_DEVICE State*)pool)[at * LANES + part] = s[r][i];
          }
        }
      }
    }
    PA_UNROLL for (int r = 0; r < R; r++) {
      const int row = first + r * 32 / LANES;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const size_t at = (((size_t)to * HV + head) * DV + row) * EACH + i;
        if (row < DV) ((PA_DEVICE State*)state)[at * LANES + part] = s[r][i];
      }
    }
  } else if (segment == segments_shape[0]) {  // rows without a segment
    for (int row = PA_LANE; row < owners_shape[0]; row += 32) {
      const int column = unit % UNITS * ROWS;
      if (owners[row] < 0) {
        for (int i = column; i < column + ROWS && i < DV; i++) y[((size_t)row * HV + head) * DV + i] = T(0.0f);
      }
    }
  }
