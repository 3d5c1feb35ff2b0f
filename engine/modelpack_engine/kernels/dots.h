  // Matmuls of few rows by dot products, as fast as the weights can be read: a simdgroup computes one
  // output of a row, or its gate and up values. With EACH > 0, weights are those of experts, and a row has
  // EACH of them, chosen [rows, EACH].
  //   weight [N, K] or [EXPERTS, N, K]: T, or packed in uint   scales, biases [..., N, K / GROUP] T (BITS < 16)
  //   bias [..., N] T (BIAS)
  //   SUMMED 1: x [rows, K] T, out [rows, N] O, or [rows, EACH, N] for every expert of a row
  //   SUMMED EACH: x [rows, EACH, K] T, out [rows, N] O: the sum over experts, times scores [rows, EACH] S
  //   SWIGLU: silu(x * weight) * (x * weight_up); JOINT: weight has N gates and then their N up rows
  //   NORMED: what is multiplied is the RMS norm of total = x + the sum of more [PARTS, 1, D] B, times
  //   norm [D] V (see add_norm.h); x and total [1, D] T, K is D, EPSILON a float's bits
  typedef PaWeights<T, BITS> Numbers;
  typedef typename Numbers::Load Load;
  typedef PaVec<T, 8> Eight;
  constexpr int CODES = Numbers::COUNT, LINES = SWIGLU ? 2 : 1;
  const int K = weight_shape[EACH ? 2 : 1] * (BITS == 16 ? 1 : 32 / BITS);
  const int vectors = K / CODES, total_loads = SUMMED * vectors;
  const int lane = PA_LANE, row = PA_Y, N = weight_shape[EACH ? 1 : 0] / (JOINT ? 2 : 1);
  const int mine = PA_X * NSG + PA_SIMD, output = mine < N ? mine : N - 1;
  PA_SHARED(Eight, normed, D / 8);
  if (NORMED) {
    constexpr int THREADS = NSG * 32, MOST = (D / 8 + THREADS - 1) / THREADS;
    typedef PaVec<B, 8> Parts;
    typedef PaVec<V, 8> Norm;
    const int index = PA_SIMD * 32 + lane;
    Eight kept[MOST];
    Norm factors[MOST];
    float squares = 0.0f;
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index;
      if (at < D / 8) {
        factors[i] = ((const PA_DEVICE Norm*)norm)[at];
        kept[i] = ((const PA_DEVICE Eight*)x)[at];
        float added[8];
        PA_UNROLL for (int e = 0; e < 8; e++) added[e] = 0.0f;
        PA_UNROLL for (int part = 0; part < PARTS; part++) {
          const Parts y = ((const PA_DEVICE Parts*)more)[part * (D / 8) + at];
          PA_UNROLL for (int e = 0; e < 8; e++) added[e] += float(y.e[e]);
        }
        PA_UNROLL for (int e = 0; e < 8; e++) {
          kept[i].e[e] = T(float(kept[i].e[e]) + float(T(added[e])));
          squares += float(kept[i].e[e]) * float(kept[i].e[e]);
        }
        if (PA_X == 0 && PA_Y == 0) ((PA_DEVICE Eight*)total)[at] = kept[i];
      }
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
    PA_SHARED(float, partial, NSG);
    if (lane == 0) partial[PA_SIMD] = squares;
    PA_SYNC();
    squares = 0.0f;
    PA_UNROLL for (int s = 0; s < NSG; s++) squares += partial[s];
    const float scaled = PA_RSQRT(squares / D + pa_float(EPSILON));
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index;
      if (at < D / 8) {
        PA_UNROLL for (int e = 0; e < 8; e++) {
          kept[i].e[e] = T(float(kept[i].e[e]) * scaled * float(factors[i].e[e]));
        }
        normed[at] = kept[i];
      }
    }
    PA_SYNC();
  }
  float sum[LINES];
  PA_UNROLL for (int l = 0; l < LINES; l++) sum[l] = 0.0f;
  for (int from = 0; from < total_loads; from += 32 * AHEAD) {
    // Load all, then compute: loads wait for memory together.
    Load words[AHEAD][LINES];
    float factor[AHEAD], scale[AHEAD][LINES], offset[AHEAD][LINES];
    int x_at[AHEAD];
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int i = from + a * 32 + lane, there = i < total_loads ? i : 0;
      const int pair = row * SUMMED + (SUMMED > 1 ? there / vectors : 0), at = there % vectors;
      const size_t gate = (EACH ? (size_t)chosen[pair] * N : 0) + output;
      factor[a] = i < total_loads ? SUMMED > 1 ? float(scores[pair]) : 1.0f : 0.0f;
      x_at[a] = (EACH && SUMMED == 1 ? pair / EACH : pair) * (K / 8) + at * (CODES / 8);
      PA_UNROLL for (int l = 0; l < LINES; l++) {
        const size_t line = gate + (JOINT && l ? N : 0);
        words[a][l] = ((const PA_DEVICE Load*)(l ? weight_up : weight))[line * vectors + at];
        if (BITS < 16) {
          const size_t group = line * (K / GROUP) + at * CODES / GROUP;
          scale[a][l] = float((l ? scales_up : scales)[group]);
          offset[a][l] = float((l ? biases_up : biases)[group]);
        }
      }
    }
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      float dot[LINES], whole = 0.0f;
      PA_UNROLL for (int l = 0; l < LINES; l++) dot[l] = 0.0f;
      PA_UNROLL for (int e = 0; e < CODES / 8; e++) {
        const Eight eight = NORMED ? normed[x_at[a] + e] : ((const PA_DEVICE Eight*)x)[x_at[a] + e];
        float value[8];
        PA_UNROLL for (int i = 0; i < 8; i++) value[i] = float(eight.e[i]);
        if (BITS < 16) {
          PA_UNROLL for (int i = 0; i < 8; i++) whole += value[i];
        }
        PA_UNROLL for (int l = 0; l < LINES; l++) {
          PA_UNROLL for (int i = 0; i < 8; i++) {
            dot[l] += Numbers::at(words[a][l], e * 8 + i) * value[i];
          }
        }
      }
      PA_UNROLL for (int l = 0; l < LINES; l++) {
        if (BITS < 16) offset[a][l] -= float(Numbers::OFFSET) * scale[a][l];
        sum[l] += factor[a] * (BITS < 16 ? scale[a][l] * dot[l] + offset[a][l] * whole : dot[l]);
      }
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    PA_UNROLL for (int l = 0; l < LINES; l++) sum[l] += PA_XOR(sum[l], mask);
  }
  if (lane == 0 && mine < N) {
    float y = sum[0];
    if (BIAS) {
      float z = 0.0f;
      PA_UNROLL for (int p = 0; p < SUMMED; p++) {
        const size_t line = (EACH ? (size_t)chosen[row * SUMMED + p] * N : 0) + output;
        y += float(bias[line]) * (SUMMED > 1 ? float(scores[row * SUMMED + p]) : 1.0f);
        if (SWIGLU) z += float(bias_up[line + (JOINT ? N : 0)]);
      }
      if (SWIGLU) sum[LINES - 1] += z;
    }
    if (SWIGLU) {
      y = float(T(y));
      y = float(T(y / (1.0f + PA_EXP2(-1.44269504f * y)))) * float(T(sum[LINES - 1]));
    }
    out[(size_t)row * N + output] = O(y);
  }
