  // Matmuls of one row with packed weights [N, K] of 4 bits, affine quantised, on tensor cores; CUDA only.
  // Weights go from memory to registers, and are multiplied as codes; sums of a group are scaled.
  //   x [K] T   weight [N, K / 8] uint, low bits first   scales, biases [N, K / GROUP] T   bias [N] T (BIAS)
  //   out [parts, N] O: several parts must be added; each is of D inputs
  //   SWIGLU: the first half of weights are gates, and out [N / 2] is silu(gate) * other half
  //   NORMED: x is the RMS norm of total = x + the sum of more [PARTS, K] B, times norm [K] V (see
  //   add_norm.h), where EPSILON is a float's bits, and there is one part
  // A block computes strips of 16 outputs (SWIGLU: 8 gates and their up rows), one of every STRIDE. Its
  // WARPS share the inputs of a strip: each reads units of four chunks of 128 codes, and the next
  // unit's codes while it multiplies. In a chunk, lane (r, c) reads the 32 codes from c * 32 on, of the
  // strip's outputs r and r + 8. So a chunk may have up to four groups: to keep their sums apart,
  // each has a column of the tensor cores' second operand, of which one row needs only one.
  constexpr int CHUNK = 128, GROUPS = CHUNK / GROUP;                    // groups of a chunk
  constexpr int TOGETHER = GROUPS == 4 ? 2 : 4, SETS = 4 / TOGETHER;    // chunks of a set of columns; sets
  constexpr int CHUNKS = D / CHUNK, UNITS = (CHUNKS + WARPS * 4 - 1) / (WARPS * 4), THREADS = WARPS * 32;
  typedef PaCodes<T, 4> Codes;
  typedef PaVec<T, 8> Eight;
  typedef PaVec<T, 2> Two;
  const int N = weight_shape[0], K = weight_shape[1] * 8, groups = K / GROUP;
  const int width = SWIGLU ? N / 2 : N, strips = (width + (SWIGLU ? 7 : 15)) / (SWIGLU ? 8 : 16);
  const int lane = PA_LANE, warp = PA_SIMD, index = warp * 32 + lane, r = lane / 4, c = lane % 4;
  const int chunk0 = PA_Z * CHUNKS, items = (strips - PA_X + STRIDE - 1) / STRIDE * UNITS;
  // The row of weights of output r or (HIGH) r + 8 of a strip; any if there is none.
  auto line = [&](int strip, int high) {
    const int at = SWIGLU ? strip * 8 + r : strip * 16 + high * 8 + r;
    return at >= width ? 0 : SWIGLU && high ? at + width : at;
  };
  auto chunk_of = [&](int unit, int j) { return (unit * 4 + j) * WARPS + warp; };
  // The chunk of column 2 * c + h of a set, which this lane has the sum of.
  auto summed = [&](int unit, int set, int h) {
    return chunk_of(unit, set * TOGETHER + (c * 2 + h) / GROUPS % TOGETHER);
  };

  uint4 codes[2][2][4];
  Two factors[2][2][SETS][2];  // scales and biases of two columns
  auto fetch = [&](int item, uint4 (&to)[2][4], Two (&by)[2][SETS][2]) {
    const int unit = item % UNITS, strip = PA_X + item / UNITS * STRIDE;
    PA_UNROLL for (int high = 0; high < 2; high++) {
      const size_t row = line(strip, high);
      PA_UNROLL for (int j = 0; j < 4; j++) {
        const int chunk = chunk_of(unit, j);
        const uint4* at = (const uint4*)weight + row * (K / 32) + (chunk0 + chunk) * (CHUNK / 32) + c;
        to[high][j] = CHUNKS % (WARPS * 4) == 0 || chunk < CHUNKS ? *at : uint4{0, 0, 0, 0};
      }
      PA_UNROLL for (int set = 0; set < SETS; set++) {
        PA_UNROLL for (int h = 0; h < (GROUPS == 1 ? 2 : 1); h++) {
          const int chunk = summed(unit, set, h);
          const size_t at = row * groups + (chunk0 + (chunk < CHUNKS ? chunk : 0)) * GROUPS + c * 2 % GROUPS;
          if (GROUPS == 1) {
            by[high][set][0].e[h] = scales[at], by[high][set][1].e[h] = biases[at];
          } else {
            by[high][set][0] = ((const Two*)scales)[at / 2], by[high][set][1] = ((const Two*)biases)[at / 2];
          }
        }
      }
    }
  };
  if (items > 0) fetch(0, codes[0], factors[0]);

  // The inputs in pairs (0 4) (1 5) (2 6) (3 7), as codes lie in a word, and the sums of groups of them.
  // Chunks that a warp reads at the same time lie in different banks.
  PA_SHARED(uint4, given, D / 8);
  PA_SHARED(float, whole, D / GROUP);
  auto place = [](int chunk, int by, int w) {
    return chunk * (CHUNK / 8) + ((w * 4 + by) ^ (chunk / WARPS % 2 * 4));
  };
  constexpr int MOST = (D / 8 + THREADS - 1) / THREADS;
  Eight kept[MOST];
  PA_UNROLL for (int i = 0; i < MOST; i++) {
    const int at = i * THREADS + index;
    if (at < D / 8) kept[i] = ((const PA_DEVICE Eight*)x)[PA_Z * (D / 8) + at];
  }
  if (NORMED) {
    typedef PaVec<B, 8> Parts;
    typedef PaVec<V, 8> Norm;
    Norm wide[MOST];
    float squares = 0.0f;
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      const int at = i * THREADS + index;
      if (at < D / 8) {
        wide[i] = ((const PA_DEVICE Norm*)norm)[at];
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
        if (PA_X == 0) ((PA_DEVICE Eight*)total)[at] = kept[i];
      }
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
    PA_SHARED(float, partial, WARPS);
    if (lane == 0) partial[warp] = squares;
    PA_SYNC();
    squares = 0.0f;
    PA_UNROLL for (int w = 0; w < WARPS; w++) squares += partial[w];
    const float scaled = PA_RSQRT(squares / D + pa_float(EPSILON));
    PA_UNROLL for (int i = 0; i < MOST; i++) {
      if (i * THREADS + index < D / 8) {
        PA_UNROLL for (int e = 0; e < 8; e++) {
          kept[i].e[e] = T(float(kept[i].e[e]) * scaled * float(wide[i].e[e]));
        }
      }
    }
  }
  PA_UNROLL for (int i = 0; i < MOST; i++) {
    const int at = i * THREADS + index;
    float sum = 0.0f;
    if (at < D / 8) {
      PA_UNROLL for (int e = 0; e < 8; e++) sum += float(kept[i].e[e]);
      const uint4 v = *(const uint4*)&kept[i];
      given[place(at / (CHUNK / 8), at % (CHUNK / 8) / 4, at % 4)] =
          uint4{__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632)};
    }
    PA_UNROLL for (int mask = GROUP / 16; mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    if (at < D / 8 && at % (GROUP / 8) == 0) whole[at / (GROUP / 8)] = sum;
  }
  PA_SYNC();

  // The x that this lane gives to the tensor cores: those of its column's chunk and group, if any.
  const bool gives = r < TOGETHER * GROUPS && r % GROUPS == c * GROUPS / 4;
  float acc[2] = {0.0f, 0.0f};
  PA_SHARED(float, sums, 2 * WARPS * 16);
  auto multiply = [&](int item, const uint4 (&by)[2][4], const Two (&scaling)[2][SETS][2]) {
    const int unit = item % UNITS;
    PA_UNROLL for (int set = 0; set < SETS; set++) {
      uint4 b[4];
      const int own = chunk_of(unit, set * TOGETHER + r / GROUPS);
      PA_UNROLL for (int w = 0; w < 4; w++) {
        b[w] = gives && own < CHUNKS ? given[place(own, c, w)] : uint4{0, 0, 0, 0};
      }
      float sum[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
      PA_UNROLL for (int t = 0; t < TOGETHER; t++) {
        const int j = set * TOGETHER + t;
        const unsigned mask = r / GROUPS == t ? 0xffffffffu : 0u;
        PA_UNROLL for (int w = 0; w < 4; w++) {
          const unsigned low = w == 0 ? by[0][j].x : w == 1 ? by[0][j].y : w == 2 ? by[0][j].z : by[0][j].w;
          const unsigned high = w == 0 ? by[1][j].x : w == 1 ? by[1][j].y : w == 2 ? by[1][j].z : by[1][j].w;
          const unsigned one[4] = {Codes::nibbles(low), Codes::nibbles(high), Codes::nibbles(low >> 4),
                                   Codes::nibbles(high >> 4)};
          const unsigned two[4] = {Codes::nibbles(low >> 8), Codes::nibbles(high >> 8),
                                   Codes::nibbles(low >> 12), Codes::nibbles(high >> 12)};
          pa_mma<T>(sum[0], one, b[w].x & mask, b[w].y & mask);
          pa_mma<T>(sum[1], two, b[w].z & mask, b[w].w & mask);
        }
      }
      PA_UNROLL for (int h = 0; h < 2; h++) {
        // With groups of 128, lanes c > 1 have no column.
        const int chunk = summed(unit, set, h);
        const bool there = chunk < CHUNKS && (GROUPS > 1 || c < 2);
        const float all = there ? whole[chunk * GROUPS + (c * 2 + h) % GROUPS] : 0.0f;
        PA_UNROLL for (int high = 0; high < 2; high++) {
          const float scale = float(scaling[high][set][0].e[h]);
          const float offset = float(scaling[high][set][1].e[h]) - Codes::OFFSET * scale;
          acc[high] += scale * (sum[0][high * 2 + h] + sum[1][high * 2 + h]) + offset * all;
        }
      }
    }
    if (unit != UNITS - 1) return;
    const int strip = PA_X + item / UNITS * STRIDE, turn = item / UNITS % 2;
    PA_UNROLL for (int high = 0; high < 2; high++) {
      acc[high] += PA_XOR(acc[high], 1);
      acc[high] += PA_XOR(acc[high], 2);
      if (c == 0) sums[(turn * WARPS + warp) * 16 + high * 8 + r] = acc[high];
      acc[high] = 0.0f;
    }
    PA_SYNC();
    const int at = SWIGLU ? strip * 8 + lane : strip * 16 + lane;
    if (warp == item / UNITS % WARPS && lane < (SWIGLU ? 8 : 16) && at < width) {
      float value = 0.0f, up = 0.0f;
      PA_UNROLL for (int w = 0; w < WARPS; w++) {
        value += sums[(turn * WARPS + w) * 16 + lane];
        if (SWIGLU) up += sums[(turn * WARPS + w) * 16 + lane + 8];
      }
      if (BIAS && PA_Z == 0) {
        value += float(bias[at]);
        if (SWIGLU) up += float(bias[at + width]);
      }
      if (SWIGLU) {
        value = float(T(value));
        value = float(T(value / (1.0f + PA_EXP2(-1.44269504f * value)))) * float(T(up));
      }
      out[(size_t)PA_Z * width + at] = O(value);
    }
  };
  for (int item = 0; item < items; item += 2) {
    if (item + 1 < items) fetch(item + 1, codes[1], factors[1]);
    multiply(item, codes[0], factors[0]);
    if (item + 1 < items) {
      if (item + 2 < items) fetch(item + 2, codes[0], factors[0]);
      multiply(item + 1, codes[1], factors[1]);
    }
  }
