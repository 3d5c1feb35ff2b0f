  // What the gated delta rule of a tile of 16 tokens needs, besides the state before it (CUDA only), by the
  // UT transform of https://arxiv.org/abs/2412.06464. A warp computes a tile of a head; segments are those of
  // `delta_wide`, and the other arguments those of `delta_rule`, RAW. With G_t the decay from before the tile up
  // to t, b the betas, k and q of length 1 and 1 / sqrt(DK), and u_t what token t adds to the state, as u_t k_t:
  //   (I + A) u = b (v - G state k), A_ts = b_t G_t / G_s (k_t k_s) for s < t
  //   mixes [slots, HV, 2, 16, 16] T: (I + A)^-1 b, and G_t / G_s (q_t k_s) for s <= t
  //   factors [slots, HV, 4, 16] float, of raw keys and queries: those of `state k` and `state q`, then of k as it
  //   joins the state after the tile, and the first of the last 16 is the decay of the whole tile
  constexpr int ROWS = 16;
  typedef PaVec<T, 8> Vec;
  PA_SHARED(float, lower, ROWS * (ROWS + 1));
  PA_SHARED(float, sums, ROWS);
  PA_SHARED(float, betas, ROWS);
  PA_SHARED(float, lengths, 2 * ROWS);
  PA_SHARED(int, owner, 1);
  const int lane = PA_LANE, r = lane / 4, c = lane % 4, tile = PA_X / HV, head = PA_X % HV;
  if (lane == 0) owner[0] = -1;
  PA_SYNC();
  for (int i = lane; i < segments_shape[0]; i += 32) {
    const int own = segments[i * 6 + 2], at = segments[i * 6 + 1], from = at / ROWS + i, marked = segments[i * 6 + 3];
    const bool is_long = own >= LONG && (marked < 0 || marked % ROWS == 0) && owners[at] == i;
    if (is_long && from <= tile && tile < from + (own + ROWS - 1) / ROWS) owner[0] = i;
  }
  PA_SYNC();
  const int segment = owner[0];
  if (segment < 0) return;
  const int start = segments[segment * 6 + 1], before = (tile - start / ROWS - segment) * ROWS;
  const int rest = segments[segment * 6 + 2] - before, there = rest < ROWS ? rest : ROWS;
  const size_t row0 = (size_t)start + before;

  float decay = 0.0f, beta = 0.0f;  // of row `lane`
  if (lane < there) {
    const size_t column = (row0 + lane) * SCALARS + head / PER * 2 * PER + head % PER;
    const float raw = float(g[column + G_AT]) + biases[head], low = raw > 0.0f ? -raw : raw;
    decay = 1.44269504f * rates[head] * ((raw > 0.0f ? raw : 0.0f) + PA_LOG(1.0f + PA_EXP2(1.44269504f * low)));
    beta = 1.0f / (1.0f + PA_EXP2(-1.44269504f * float(g[column + BETA_AT])));
  }
  if (lane < ROWS) lower[lane] = decay, betas[lane] = beta;
  PA_SYNC();
  if (lane < ROWS) {
    float sum = 0.0f;
    for (int i = 0; i <= lane; i++) sum += lower[i];
    sums[lane] = sum;
  }
  // The products of all keys, and of queries, with all keys; a lane reads 8 consecutive elements of four rows.
  float kk[2][4] = {}, qk[2][4] = {}, squares[4] = {};
  const size_t low_row = row0 + (r < there ? r : 0), high_row = row0 + (r + 8 < there ? r + 8 : 0);
  PA_UNROLL for (int at = 0; at < DK; at += 32) {
    const int column = head / (HV / HK) * DK + at + c * 8;
    Vec rows[4] = {*(const Vec*)(k + low_row * KEYS + K_AT + column), *(const Vec*)(k + high_row * KEYS + K_AT + column),
                   *(const Vec*)(q + low_row * KEYS + Q_AT + column), *(const Vec*)(q + high_row * KEYS + Q_AT + column)};
    unsigned pairs[4][4];
    PA_UNROLL for (int i = 0; i < 4; i++) {
      PA_UNROLL for (int e = 0; e < 8; e++) squares[i] += float(rows[i].e[e]) * float(rows[i].e[e]);
      PA_UNROLL for (int e = 0; e < 4; e++) pairs[i][e] = ((const unsigned*)&rows[i])[e];
    }
    PA_UNROLL for (int e = 0; e < 4; e += 2) {
      const unsigned keys[4] = {pairs[0][e], pairs[1][e], pairs[0][e + 1], pairs[1][e + 1]};
      const unsigned queries[4] = {pairs[2][e], pairs[3][e], pairs[2][e + 1], pairs[3][e + 1]};
      PA_UNROLL for (int n = 0; n < 2; n++) {
        pa_mma<T>(kk[n], keys, pairs[n][e], pairs[n][e + 1]);
        pa_mma<T>(qk[n], queries, pairs[n][e], pairs[n][e + 1]);
      }
    }
  }
  PA_UNROLL for (int i = 0; i < 4; i++) {
    PA_UNROLL for (int mask = 1; mask < 4; mask *= 2) squares[i] += PA_XOR(squares[i], mask);
    const int row = r + i % 2 * 8;
    const float square = squares[i] + pa_float(EPSILON);
    if (c == 0) lengths[i / 2 * ROWS + row] = PA_RSQRT(i < 2 ? square : square * DK);
  }
  PA_SYNC();
  const size_t cell = (size_t)tile * HV + head;
  T* const mix = mixes + cell * 2 * ROWS * ROWS;
  PA_UNROLL for (int n = 0; n < 2; n++) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int t = r + i / 2 * 8, s = n * 8 + c * 2 + i % 2;
      const float by = PA_EXP2(s <= t ? sums[t] - sums[s] : 0.0f) * lengths[s];
      lower[t * (ROWS + 1) + s] = s < t ? betas[t] * by * lengths[t] * kk[n][i] : 0.0f;
      mix[(ROWS + t) * ROWS + s] = T(s <= t ? by * lengths[ROWS + t] * qk[n][i] : 0.0f);
    }
  }
  PA_SYNC();
  if (lane >= ROWS) return;
  float column[ROWS];  // of the inverse
  PA_UNROLL for (int t = 0; t < ROWS; t++) {
    column[t] = t == lane ? 1.0f : 0.0f;
    PA_UNROLL for (int s = 0; s < t; s++) column[t] -= lower[t * (ROWS + 1) + s] * column[s];
    mix[t * ROWS + lane] = T(column[t] * beta);
  }
  float* const factor = factors + cell * 4 * ROWS;
  const float last = sums[ROWS - 1], passed = PA_EXP2(sums[lane]);
  factor[lane] = passed * lengths[lane];
  factor[ROWS + lane] = passed * lengths[ROWS + lane];
  factor[2 * ROWS + lane] = PA_EXP2(last - sums[lane]) * lengths[lane];
  factor[3 * ROWS + lane] = PA_EXP2(last);
