  // The gated delta rule of long segments, in tiles of 16 rows on tensor cores (CUDA only). It follows the text of
  // `delta_rule`, by which the first blocks compute the other segments. A warp has 16 rows of a head's state, as
  // float32 in registers; operands of matmuls have 16 bits.
  //   mixes, factors: of `delta_tiles`
  constexpr int TOKENS = 16, WARPS = 4, OWN = WARPS * 16, SPLIT = DV / OWN, LINE = DK + 8, SHORT = OWN + 8, DEEP = DK / 8;
  constexpr int STAGE = TOKENS * (2 * LINE + SHORT);
  typedef PaVec<T, 8> Eight;  // of 16 bytes, to which copies are aligned
  PA_SHARED(Eight, memory, 2 * STAGE / 8);
  T* const stages = (T*)memory;
  const int own_block = PA_X - ((segments_shape[0] + 1) * HV * UNITS + NSG - 1) / NSG;
  if (own_block < 0) return;
  const int long_segment = segments_shape[0] - 1 - own_block / (SPLIT * HV), of_head = own_block / SPLIT % HV;
  if (long_segment < 0) return;
  const int from_row = segments[long_segment * 6], row0 = segments[long_segment * 6 + 1], length = segments[long_segment * 6 + 2];
  const int mark = segments[long_segment * 6 + 3];
  if (length < LONG || (mark >= 0 && mark % TOKENS) || owners[row0] != long_segment) return;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, r = lane / 4, c = lane % 4;
  const int column = of_head * DV + own_block % SPLIT * OWN, key_column = of_head / (HV / HK) * DK;
  auto place = [&](size_t index, int tile, int i) {  // of two elements of a state
    return ((index * HV + of_head) * DV + own_block % SPLIT * OWN + warp * 16 + r + i * 8) * DK + tile * 8 + c * 2;
  };
  float s[DEEP][4];
  PA_UNROLL for (int tile = 0; tile < DEEP; tile++) {
    PA_UNROLL for (int i = 0; i < 2; i++) {
      PaVec<float, 2> two = {{0.0f, 0.0f}};
      const size_t at = place(from_row < -1 ? -2 - from_row : from_row < 0 ? 0 : from_row, tile, i);
      if (from_row != -1) two = *(const PaVec<float, 2>*)((from_row < -1 ? pool : state) + at);
      s[tile][i * 2] = two.e[0], s[tile][i * 2 + 1] = two.e[1];
    }
  }
  auto store = [&](float* to, size_t index) {
    PA_UNROLL for (int tile = 0; tile < DEEP; tile++) {
      PA_UNROLL for (int i = 0; i < 2; i++) {
        *(PaVec<float, 2>*)(to + place(index, tile, i)) = {{s[tile][i * 2], s[tile][i * 2 + 1]}};
      }
    }
  };
  auto load = [&](int stage, int at) {  // keys, queries and values of a tile
    T* const to = stages + stage * STAGE;
    PA_UNROLL for (int i = thread; i < TOKENS * (DK / 8); i += WARPS * 32) {
      const int t = i / (DK / 8), e = i % (DK / 8) * 8;
      const size_t token = (size_t)row0 + at + t;
      pa_copy16_or_zero(to + t * LINE + e, k + token * KEYS + K_AT + key_column + e, at + t < length);
      pa_copy16_or_zero(to + (TOKENS + t) * LINE + e, q + token * KEYS + Q_AT + key_column + e, at + t < length);
    }
    for (int i = thread; i < TOKENS * (OWN / 8); i += WARPS * 32) {
      const int t = i / (OWN / 8), e = i % (OWN / 8) * 8;
      const size_t token = (size_t)row0 + at + t;
      pa_copy16_or_zero(to + 2 * TOKENS * LINE + t * SHORT + e, v + token * VALUES + V_AT + column + e, at + t < length);
    }
    pa_copies_commit();
  };
  load(0, 0);
  for (int at = 0, stage = 0; at < length; at += TOKENS, stage ^= 1) {
    const size_t cell = ((size_t)(row0 / TOKENS + long_segment + at / TOKENS) * HV + of_head);
    const T* const mix = mixes + cell * 2 * TOKENS * TOKENS;
    const float* const factor = factors + cell * 4 * TOKENS;
    unsigned mixed[2][2][2];
    float by[3][4];
    PA_UNROLL for (int n = 0; n < 2; n++) {
      PA_UNROLL for (int i = 0; i < 2; i++) {
        PA_UNROLL for (int m = 0; m < 2; m++) {
          mixed[m][n][i] = *(const unsigned*)(mix + (m * TOKENS + n * 8 + r) * TOKENS + c * 2 + i * 8);
        }
        PA_UNROLL for (int f = 0; f < 3; f++) by[f][n * 2 + i] = factor[f * TOKENS + n * 8 + c * 2 + i];
      }
    }
    const float whole = factor[3 * TOKENS];
    pa_copies_wait<0>();
    PA_SYNC();
    if (at + TOKENS < length) load(stage ^ 1, at + TOKENS);
    const T* const keys = stages + stage * STAGE;
    const T* const queries = keys + TOKENS * LINE;
    const T* const values = queries + TOKENS * LINE + warp * 16;
    float known[2][4] = {}, out[2][4] = {}, added[2][4] = {};  // [rows of the state, tokens]
    PA_UNROLL for (int step = 0; step < DEEP / 2; step++) {
      const float(*two)[4] = s + step * 2;
      const unsigned a[4] = {pa_pack<T>(two[0][0], two[0][1]), pa_pack<T>(two[0][2], two[0][3]),
                             pa_pack<T>(two[1][0], two[1][1]), pa_pack<T>(two[1][2], two[1][3])};
      const int place_of_lane = (lane % 8 + lane / 16 * 8) * LINE + step * 16 + lane / 8 % 2 * 8;
      unsigned b[4];
      pa_ldmatrix(b, keys + place_of_lane);
      PA_UNROLL for (int n = 0; n < 2; n++) pa_mma<T>(known[n], a, b[n * 2], b[n * 2 + 1]);
      pa_ldmatrix(b, queries + place_of_lane);
      PA_UNROLL for (int n = 0; n < 2; n++) pa_mma<T>(out[n], a, b[n * 2], b[n * 2 + 1]);
    }
    PA_UNROLL for (int n = 0; n < 2; n++) {
      PA_UNROLL for (int i = 0; i < 4; i++) {
        const float value = float(values[(n * 8 + c * 2 + i % 2) * SHORT + r + i / 2 * 8]);
        known[n][i] = value - by[0][n * 2 + i % 2] * known[n][i];
        out[n][i] *= by[1][n * 2 + i % 2];
      }
    }
    auto operand = [](unsigned (&a)[4], const float (&d)[2][4]) {
      PA_UNROLL for (int i = 0; i < 4; i++) a[i] = pa_pack<T>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
    };
    unsigned a[4];
    operand(a, known);
    PA_UNROLL for (int n = 0; n < 2; n++) pa_mma<T>(added[n], a, mixed[0][n][0], mixed[0][n][1]);
    operand(a, added);
    PA_UNROLL for (int n = 0; n < 2; n++) {
      pa_mma<T>(out[n], a, mixed[1][n][0], mixed[1][n][1]);
      PA_UNROLL for (int i = 0; i < 4; i++) {
        const int t = n * 8 + c * 2 + i % 2;
        const size_t to = ((size_t)row0 + at + t) * HV * DV + column + warp * 16 + r + i / 2 * 8;
        if (at + t < length) y[to] = T(out[n][i]);
        added[n][i] *= by[2][n * 2 + i % 2];
      }
    }
    operand(a, added);
    PA_UNROLL for (int tile = 0; tile < DEEP; tile += 2) {
      unsigned b[4];
      pa_ldmatrix_trans(b, keys + lane % 16 * LINE + tile * 8 + lane / 16 * 8);
      PA_UNROLL for (int n = 0; n < 2; n++) {
        PA_UNROLL for (int i = 0; i < 4; i++) s[tile + n][i] *= whole;
        pa_mma<T>(s[tile + n], a, b[n * 2], b[n * 2 + 1]);
      }
    }
    if (at + TOKENS == mark) store((float*)pool, segments[long_segment * 6 + 4]);
  }
  store((float*)state, segments[long_segment * 6 + 5]);
