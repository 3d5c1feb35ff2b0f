  // What rows' adapters add to the parts of a product, on tensor cores (CUDA only), for many rows; `chunks` comes
  // before. A block multiplies 16 rows by the matrices of their adapters. Prompts have the same adapter in most
  // of these rows; of the first rows, which are those of single tokens, it multiplies by that of one row only.
  //   given [PARTS, rows, OUT] J   x [rows, IN] T   down [slots, N, IN] T   up [slots, RANK, OUT] T
  //   slots [rows] int: 0 is no adapter   singles [1 + rows of single tokens]: only its shape is read
  //   out [rows, OUT] T   GATED: as for `adapters`
  constexpr int ROWS = 16, WARPS = 8, TILES = RANKS / 8, TOGETHER = TILES < 4 ? TILES : 4, COLUMNS = TOGETHER * 8;
  constexpr int BOTH = GATED ? 2 : 1, LINE = RANKS + 8, WIDTH = 64;
  typedef PaVec<J, 8> Given;
  typedef PaVec<T, 8> Out;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, r = lane / 4, c = lane % 4;
  const int rows = slots_shape[0], tokens = singles_shape[0] - 1;
  const bool is_single = block < tokens;
  const int row0 = is_single ? block / ROWS * ROWS : tokens + (block - tokens) * ROWS;
  const int end_row = is_single ? tokens : rows;
  PA_SHARED(int, own, ROWS);
  PA_SHARED(int, is_first, ROWS);
  PA_SHARED(float, products, WARPS * ROWS * COLUMNS);
  PA_SHARED(T, inner, ROWS * LINE);
  if (thread < ROWS) own[thread] = row0 + thread < end_row ? slots[row0 + thread] : -1;
  PA_SYNC();
  if (thread < ROWS) {
    bool first = own[thread] >= 0;
    for (int row = 0; row < thread; row++) first = first && own[row] != own[thread];
    is_first[thread] = first && (!is_single || thread == block % ROWS);
  }
  PA_SYNC();
  const int lower = row0 + r < rows ? row0 + r : rows - 1, upper = row0 + r + 8 < rows ? row0 + r + 8 : rows - 1;
  for (int lead = 0; lead < ROWS; lead++) {
    if (!is_first[lead]) continue;
    const int slot = own[lead];
    // The products of all rows with the first matrix; each warp adds up a part of the inputs, of which a lane
    // reads 8 consecutive ones and uses them in two steps.
    for (int tile = 0; tile < TILES && slot > 0; tile += TOGETHER) {
      float d[TOGETHER][4];
      PA_UNROLL for (int t = 0; t < TOGETHER; t++) d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0.0f;
      const T* by = down + ((size_t)slot * N + product + tile * 8 + r) * IN + c * 8;
      _Pragma("unroll 2") for (int k = warp * 32; k < IN; k += WARPS * 32) {
        const uint4 low = *(const uint4*)(x + (size_t)lower * IN + k + c * 8);
        const uint4 high = *(const uint4*)(x + (size_t)upper * IN + k + c * 8);
        const unsigned first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
        PA_UNROLL for (int t = 0; t < TOGETHER; t++) {
          if (tile + t < TILES) {
            const uint4 w = *(const uint4*)(by + (size_t)t * 8 * IN + k);
            pa_mma<T>(d[t], first, w.x, w.y);
            pa_mma<T>(d[t], second, w.z, w.w);
          }
        }
      }
      PA_UNROLL for (int t = 0; t < TOGETHER; t++) {
        PA_UNROLL for (int i = 0; i < 4; i++) {
          products[(warp * ROWS + r + i / 2 * 8) * COLUMNS + t * 8 + c * 2 + i % 2] = d[t][i];
        }
      }
      PA_SYNC();
      for (int at = thread; at < ROWS * COLUMNS; at += WARPS * 32) {
        const int column = tile * 8 + at % COLUMNS;
        float sum = 0.0f;
        PA_UNROLL for (int w = 0; w < WARPS; w++) sum += products[w * ROWS * COLUMNS + at];
        if (column < RANKS) inner[at / COLUMNS * LINE + column] = T(sum);
      }
      PA_SYNC();
    }
    // Each warp computes 64 outputs at a time: column n of tile j is output n * 8 + j, so that lanes read and
    // write consecutive ones.
    for (int at = start + warp * WIDTH; at < stop; at += WARPS * WIDTH) {
      float d[BOTH][8][4];
      PA_UNROLL for (int l = 0; l < BOTH; l++) {
        PA_UNROLL for (int i = 0; i < 4; i++) {
          PA_UNROLL for (int j = 0; j < 8; j++) d[l][j][i] = 0.0f;
          PA_UNROLL for (int part = 0; part < PARTS; part++) {
            const size_t line = (size_t)part * rows + (i / 2 ? upper : lower);
            const Given y = *(const Given*)(given + line * OUT + l * (OUT / 2) + at + c * 16 + i % 2 * 8);
            PA_UNROLL for (int j = 0; j < 8; j++) d[l][j][i] += float(y.e[j]);
          }
        }
        for (int k = 0; k < RANK && slot > 0; k += 16) {
          const bool deep = k + 8 < RANK;
          const T* from = inner + r * LINE + l * RANK + k + c * 2;
          const unsigned a[4] = {*(const unsigned*)from, *(const unsigned*)(from + 8 * LINE),
                                 deep ? *(const unsigned*)(from + 8) : 0u,
                                 deep ? *(const unsigned*)(from + 8 * LINE + 8) : 0u};
          const T* by = up + ((size_t)slot * RANK + k + c * 2) * OUT + l * (OUT / 2) + at + r * 8;
          const uint4 none = {0u, 0u, 0u, 0u};
          const PaVec<uint4, 4> b = {{*(const uint4*)by, *(const uint4*)(by + OUT),
                                      deep ? *(const uint4*)(by + 8 * (size_t)OUT) : none,
                                      deep ? *(const uint4*)(by + 9 * (size_t)OUT) : none}};
          PA_UNROLL for (int j = 0; j < 8; j++) {
            unsigned words[4];
            PA_UNROLL for (int i = 0; i < 4; i++) {
              words[i] = j / 2 == 0 ? b.e[i].x : j / 2 == 1 ? b.e[i].y : j / 2 == 2 ? b.e[i].z : b.e[i].w;
            }
            const unsigned halves = j % 2 ? 0x7632u : 0x5410u;
            pa_mma<T>(d[l][j], a, __byte_perm(words[0], words[1], halves), __byte_perm(words[2], words[3], halves));
          }
        }
      }
      PA_UNROLL for (int i = 0; i < 4; i++) {
        const int row = r + i / 2 * 8, to = at + c * 16 + i % 2 * 8;
        if (own[row] == slot) {
          Out y;
          PA_UNROLL for (int j = 0; j < 8; j++) {
            y.e[j] = T(d[0][j][i]);
            if (GATED) {
              const float g = float(y.e[j]);
              y.e[j] = T(float(T(g / (1.0f + PA_EXP2(-1.44269504f * g)))) * float(T(d[BOTH - 1][j][i])));
            }
          }
          *(Out*)(out + (size_t)(row0 + row) * (OUT / BOTH) + to) = y;
        }
      }
    }
    PA_SYNC();
  }
