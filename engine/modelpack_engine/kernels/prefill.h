  // Attention of tiles of 16 consecutive rows of one sequence over its blocks, on tensor cores; CUDA
  // only. FlashAttention-2 (https://arxiv.org/abs/2307.08691): a warp a query head, the warps of a
  // block share the keys and values of one KV head, TILE tokens at a time, two tiles in flight.
  //   q [rows, HK*G, D] T   k_pool, v_pool [slots, HK, D] T   tables [tiles, width] int
  //   spans [tiles, 2] int: position of the first row, number of rows   sinks [HK*G] S   written [1]
  //   params [3] float: factors of q, (unused), and of a score after tanh
  //   out [rows, HK*G, D] T: zero for rows that a tile does not have; or with SPLIT, where blocks share
  //   the context: out [rows, HK*G, parts, D] float, not yet divided, and stats [rows, HK*G, parts, 2]
  constexpr int STEPS = D / 16, COLUMNS = D / 8, KEYS = TILE / 8, PAD = D + 8, THREADS = WARPS * 32;
  constexpr int GROUPS = (G + WARPS - 1) / WARPS, LOADS = TILE * D / 8;
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  __shared__ __align__(16) T tiles_k[2][TILE * PAD];
  __shared__ __align__(16) T tiles_v[2][TILE * PAD];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int kv_head = blockIdx.x / GROUPS, g = blockIdx.x % GROUPS * WARPS + warp;
  const int tile = blockIdx.y, head = kv_head * G + (g < G ? g : 0), width = tables_shape[1];
  const int first = spans[tile * 2], count = spans[tile * 2 + 1];
  const int r = lane / 4, c = lane % 4 * 2;
  const int part = blockIdx.z, parts = gridDim.z;
  if (count <= 0) {
    for (int i = lane; i < 16 * D && g < G; i += 32) {
      const size_t at = ((size_t)(tile * 16 + i / D) * (HK * G) + head) * parts + part;
      out[at * D + i % D] = T(0.0f);
      if (SPLIT && i % D == 0) stats[at * 2] = LOWEST, stats[at * 2 + 1] = 0.0f;
    }
    return;
  }
  const int* table = tables + (size_t)tile * width;
  int end = first + count;
  if (end > width * BLOCK) end = width * BLOCK;
  const int low = WINDOW > 0 && first + 1 > WINDOW ? first + 1 - WINDOW : 0;
  int start = low / TILE * TILE, stop = end;
  if (SPLIT) {  // equal shares of what the tile sees, in whole tiles of keys
    const int share = ((end - start + parts - 1) / parts + TILE - 1) / TILE * TILE;
    start += part * share;
    if (stop > start + share) stop = start + share;
  }

  unsigned queries[STEPS][4];
  PA_UNROLL for (int s = 0; s < STEPS; s++) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const size_t row = tile * 16 + r + i % 2 * 8;
      queries[s][i] = *(const unsigned*)(q + (row * (HK * G) + head) * D + s * 16 + c + i / 2 * 8);
    }
  }
  float top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f}, acc[COLUMNS][4];
  PA_UNROLL for (int n = 0; n < COLUMNS; n++) PA_UNROLL for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;

  auto load = [&](int base, int side) {
    for (int x = threadIdx.x; x < LOADS; x += THREADS) {
      const int key = x / COLUMNS, v = x % COLUMNS * 8;
      int token = base + key;
      token = token < end ? token : end - 1;
      const size_t line = ((size_t)table[token / BLOCK] * BLOCK + token % BLOCK) * HK + kv_head;
      pa_copy16(&tiles_k[side][key * PAD + v], k_pool + line * D + v);
      pa_copy16(&tiles_v[side][key * PAD + v], v_pool + line * D + v);
    }
    asm volatile("cp.async.commit_group;");
  };
  if (start < stop) load(start, 0);
  int side = 0;
  for (int base = start; base < stop; base += TILE, side ^= 1) {
    if (base + TILE < stop) {
      load(base + TILE, side ^ 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    const T* keys = tiles_k[side];
    const T* values = tiles_v[side];
    float score[KEYS][4];
    PA_UNROLL for (int n = 0; n < KEYS; n++) PA_UNROLL for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
    PA_UNROLL for (int n = 0; n < KEYS; n += 2) {
      PA_UNROLL for (int s = 0; s < STEPS; s++) {
        unsigned b[4];
        pa_ldmatrix(b, keys + (n * 8 + lane % 8 + lane / 16 * 8) * PAD + s * 16 + lane / 8 % 2 * 8);
        pa_mma<T>(score[n], queries[s], b[0], b[1]);
        pa_mma<T>(score[n + 1], queries[s], b[2], b[3]);
      }
    }
    const bool edge = base + TILE > first || base < low + 16;
    PA_UNROLL for (int n = 0; n < KEYS; n++) {
      PA_UNROLL for (int i = 0; i < 4; i++) {
        float x = score[n][i] * params[0];
        if (SOFTCAP) x = (1.0f - 2.0f / (PA_EXP2(2.0f * LOG2E * x) + 1.0f)) * params[2];
        if (edge) {
          const int key = base + n * 8 + c + i % 2;
          int position = first + r + i / 2 * 8;
          position = position < end ? position : end - 1;
          if (key > position || (WINDOW > 0 && key <= position - WINDOW)) x = 4.0f * LOWEST;
        }
        score[n][i] = x;
      }
    }
    PA_UNROLL for (int h = 0; h < 2; h++) {
      float most = top[h];
      PA_UNROLL for (int n = 0; n < KEYS; n++) {
        most = fmaxf(most, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
      }
      most = fmaxf(most, PA_XOR(most, 1));
      most = fmaxf(most, PA_XOR(most, 2));
      const float keep = PA_EXP2(top[h] - most);
      top[h] = most;
      sum[h] *= keep;
      PA_UNROLL for (int n = 0; n < COLUMNS; n++) {
        acc[n][2 * h] *= keep;
        acc[n][2 * h + 1] *= keep;
      }
      PA_UNROLL for (int n = 0; n < KEYS; n++) {
        PA_UNROLL for (int i = 2 * h; i < 2 * h + 2; i++) {
          score[n][i] = PA_EXP2(score[n][i] - most);
          sum[h] += score[n][i];
        }
      }
    }
    PA_UNROLL for (int k = 0; k < TILE / 16; k++) {
      unsigned p[4];
      PA_UNROLL for (int i = 0; i < 4; i++) {
        const float* from = score[2 * k + i / 2] + i % 2 * 2;
        p[i] = pa_pack<T>(from[0], from[1]);
      }
      PA_UNROLL for (int n = 0; n < COLUMNS; n += 2) {
        unsigned b[4];
        pa_ldmatrix_trans(b, values + (k * 16 + lane % 16) * PAD + n * 8 + lane / 16 * 8);
        pa_mma<T>(acc[n], p, b[0], b[1]);
        pa_mma<T>(acc[n + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  if (g >= G) return;
  PA_UNROLL for (int h = 0; h < 2; h++) {
    sum[h] += PA_XOR(sum[h], 1);
    sum[h] += PA_XOR(sum[h], 2);
    if (SINKS && !SPLIT) {
      const float sink = float(sinks[head]) * LOG2E, most = fmaxf(top[h], sink);
      const float keep = PA_EXP2(top[h] - most);
      sum[h] = sum[h] * keep + PA_EXP2(sink - most);
      PA_UNROLL for (int n = 0; n < COLUMNS; n++) {
        acc[n][2 * h] *= keep;
        acc[n][2 * h + 1] *= keep;
      }
    }
    const int row = r + h * 8;
    if (SPLIT) {
      const bool real = row < count;
      const size_t at = ((size_t)(tile * 16 + row) * (HK * G) + head) * parts + part;
      PA_UNROLL for (int n = 0; n < COLUMNS; n++) {
        PA_UNROLL for (int i = 0; i < 2; i++) out[at * D + c + n * 8 + i] = real ? acc[n][2 * h + i] : 0.0f;
      }
      if (c == 0) stats[at * 2] = real ? top[h] : LOWEST, stats[at * 2 + 1] = real ? sum[h] : 0.0f;
      continue;
    }
    const float factor = row < count && sum[h] > 0.0f ? 1.0f / sum[h] : 0.0f;
    unsigned* to = (unsigned*)(out + ((size_t)(tile * 16 + row) * (HK * G) + head) * D + c);
    PA_UNROLL for (int n = 0; n < COLUMNS; n++) {
      to[n * 4] = pa_pack<T>(acc[n][2 * h] * factor, acc[n][2 * h + 1] * factor);
    }
  }
