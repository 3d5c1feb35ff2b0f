  // What rows' adapters add to the parts of a product, on tensor cores (CUDA only), for many rows, after `shrink_wide`;
  // `chunks` comes before. A block of 8 warps computes 16 rows; rows of single tokens come first, and each of their threads
  // computes 8 outputs.
  //   given [PARTS, rows, OUT] J   inner [rows, N] T: rows times the first matrices   up [slots, RANK, OUT] T
  //   slots [rows] int: 0 is no adapter   singles [1 + rows of single tokens]: only its shape is read
  //   out [rows, OUT] T   GATED: as for `adapters`
  PA_LET_NEXT_START();
  constexpr int ROWS = 16, WIDTH = CHUNK / 8, EACH = WIDTH / 8, BOTH = GATED ? 2 : 1;
  constexpr int LANES = CHUNK / 8, TOKENS = 256 / LANES;  // of a single token, and tokens of a block
  typedef PaVec<J, EACH> Given;
  typedef PaVec<T, EACH> Out;
  typedef PaVec<unsigned, EACH / 2> Pairs;
  typedef PaVec<J, 8> GivenEight;
  typedef PaVec<T, 8> Eight;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, r = lane / 4, c = lane % 4;
  const int rows = slots_shape[0], tokens = singles_shape[0] - 1, before = (tokens + TOKENS - 1) / TOKENS;
  auto activated = [](float gate, float other) {
    const float g = float(T(gate));
    return T(float(T(g / (1.0f + PA_EXP2(-1.44269504f * g)))) * float(T(other)));
  };
  if (block < before) {
    const int row = block * TOKENS + thread / LANES, at = start + thread % LANES * 8;
    const bool there = row < tokens && at < stop;
    const int slot = there ? slots[row] : 0;
    float sums[BOTH][8];
    PA_UNROLL for (int l = 0; l < BOTH; l++) {
      PA_UNROLL for (int e = 0; e < 8; e++) sums[l][e] = 0.0f;
      PA_UNROLL for (int part = 0; part < PARTS; part++) {
        if (!there) continue;
        const GivenEight y = *(const GivenEight*)(given + ((size_t)part * rows + row) * OUT + l * (OUT / 2) + at);
        PA_UNROLL for (int e = 0; e < 8; e++) sums[l][e] += float(y.e[e]);
      }
    }
    PA_WAIT_FOR_BEFORE();
    if (!there) return;
    PA_UNROLL for (int l = 0; l < BOTH; l++) {
      const T* by = up + (size_t)slot * RANK * OUT + l * (OUT / 2) + at;
      _Pragma("unroll 2") for (int k = 0; k < RANK && slot > 0; k += 8) {
        const Eight values = *(const Eight*)(inner + (size_t)row * N + product + l * RANK + k);
        PA_UNROLL for (int i = 0; i < 8; i++) {
          const Eight factors = *(const Eight*)(by + (size_t)(k + i) * OUT);
          PA_UNROLL for (int e = 0; e < 8; e++) sums[l][e] += float(values.e[i]) * float(factors.e[e]);
        }
      }
    }
    Eight y;
    PA_UNROLL for (int e = 0; e < 8; e++) y.e[e] = GATED ? activated(sums[0][e], sums[BOTH - 1][e]) : T(sums[0][e]);
    *(Eight*)(out + (size_t)row * (OUT / BOTH) + at) = y;
    return;
  }
  const int row0 = tokens + (block - before) * ROWS, at = start + warp * WIDTH;
  if (at >= stop) return;
  const int lower = row0 + r < rows ? row0 + r : rows - 1, upper = row0 + r + 8 < rows ? row0 + r + 8 : rows - 1;
  unsigned starts = 1u;  // bit i: another adapter than that of the row before
  PA_UNROLL for (int i = 1; i < ROWS; i++) {
    if (row0 + i < rows && slots[row0 + i] != slots[row0 + i - 1]) starts |= 1u << i;
  }
  float d[BOTH][EACH][4];
  PA_UNROLL for (int l = 0; l < BOTH; l++) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      PA_UNROLL for (int j = 0; j < EACH; j++) d[l][j][i] = 0.0f;
      PA_UNROLL for (int part = 0; part < PARTS; part++) {
        const size_t line = (size_t)part * rows + (i / 2 ? upper : lower);
        const Given y = *(const Given*)(given + line * OUT + l * (OUT / 2) + at + (c * 2 + i % 2) * EACH);
        PA_UNROLL for (int j = 0; j < EACH; j++) d[l][j][i] += float(y.e[j]);
      }
    }
  }
  PA_WAIT_FOR_BEFORE();
  for (int from = 0, to = 0; from < ROWS && row0 + from < rows; from = to) {
    for (to = from + 1; to < ROWS && !(starts >> to & 1u);) to++;
    const int slot = slots[row0 + from];
    if (slot <= 0) continue;
    const bool takes_lower = r >= from && r < to, takes_upper = r + 8 >= from && r + 8 < to;
    PA_UNROLL for (int l = 0; l < BOTH; l++) {
      for (int k = 0; k < RANK; k += 16) {
        const bool deep = k + 8 < RANK;
        // Output n * EACH + j is column n of tile j, so that lanes read and write consecutive ones.
        const T* second = up + ((size_t)slot * RANK + k + c * 2) * OUT + l * (OUT / 2) + at + r * EACH;
        Pairs b[4];
        PA_UNROLL for (int i = 0; i < 4; i++) {
          PA_UNROLL for (int p = 0; p < EACH / 2; p++) b[i].e[p] = 0u;
          if (i < 2 || deep) b[i] = *(const Pairs*)(second + (size_t)(i / 2 * 8 + i % 2) * OUT);
        }
        const T* by = inner + product + l * RANK + k + c * 2;
        const T *low = by + (size_t)lower * N, *high = by + (size_t)upper * N;
        const unsigned a[4] = {takes_lower ? *(const unsigned*)low : 0u, takes_upper ? *(const unsigned*)high : 0u,
                               deep && takes_lower ? *(const unsigned*)(low + 8) : 0u,
                               deep && takes_upper ? *(const unsigned*)(high + 8) : 0u};
        PA_UNROLL for (int j = 0; j < EACH; j++) {
          const unsigned halves = j % 2 ? 0x7632u : 0x5410u;
          pa_mma<T>(d[l][j], a, __byte_perm(b[0].e[j / 2], b[1].e[j / 2], halves),
                    __byte_perm(b[2].e[j / 2], b[3].e[j / 2], halves));
        }
      }
    }
  }
  PA_UNROLL for (int i = 0; i < 4; i++) {
    if (row0 + r + i / 2 * 8 >= rows) continue;
    Out y;
    PA_UNROLL for (int j = 0; j < EACH; j++) {
      y.e[j] = GATED ? activated(d[0][j][i], d[BOTH - 1][j][i]) : T(d[0][j][i]);
    }
    *(Out*)(out + (size_t)(i / 2 ? upper : lower) * (OUT / BOTH) + at + (c * 2 + i % 2) * EACH) = y;
  }
