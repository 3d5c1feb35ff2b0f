  // Decode attention on tensor cores, for query heads that share keys and values; CUDA only. A block
  // serves one row and one KV head: the query heads are the rows of the matmuls. Its warps take tiles
  // of 16 tokens in turn, with STAGES tiles in flight in each warp's own shared memory.
  //   q [B, HK*G, D] T   k_pool, v_pool [slots, HK, D] T   block_tables [B, width] int
  //   context_lens [B] int   sinks [HK*G] S   written [1]: order only   out [B, HK*G, D] T
  //   params [3] float: factors of q, (unused), and of a score after tanh
  constexpr int TILE = 16, STEPS = D / 16, COLUMNS = D / 8, PAD = D + 8, COPIES = TILE * COLUMNS / 32;
  constexpr int STAGE = 2 * TILE * PAD, TURN = WARPS * TILE, HALVES = G > 8 ? 2 : 1;
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  extern __shared__ __align__(128) unsigned char pa_memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
  const int kv_head = blockIdx.x, row = blockIdx.y, width = block_tables_shape[1];
  const int* table = block_tables + (size_t)row * width;
  const size_t heads_before = (size_t)row * (HK * G) + kv_head * G;
  int end = context_lens[row];
  if (end > width * BLOCK) end = width * BLOCK;
  const int low = WINDOW > 0 && end > WINDOW ? end - WINDOW : 0;

  T* mine = (T*)pa_memory + warp * (STAGES * STAGE);
  auto load = [&](int base, int stage) {
    if (base < end) {
      T* keys = mine + stage * STAGE;
      PA_UNROLL for (int j = 0; j < COPIES; j++) {
        const int x = j * 32 + lane, key = x / COLUMNS, v = x % COLUMNS * 8;
        const int token = base + key < end ? base + key : end - 1;
        const size_t line = ((size_t)table[token / BLOCK] * BLOCK + token % BLOCK) * HK + kv_head;
        pa_copy16(keys + key * PAD + v, k_pool + line * D + v);
        pa_copy16(keys + (TILE + key) * PAD + v, v_pool + line * D + v);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  int base = low / TILE * TILE + warp * TILE;
  PA_UNROLL for (int s = 0; s < STAGES - 1; s++) load(base + s * TURN, s);

  unsigned queries[STEPS][4];
  PA_UNROLL for (int s = 0; s < STEPS; s++) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int head = r + i % 2 * 8;
      const T* from = q + (heads_before + (head < G ? head : 0)) * D + s * 16 + c + i / 2 * 8;
      queries[s][i] = i % 2 < HALVES && head < G ? *(const unsigned*)from : 0u;
    }
  }
  float top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f}, acc[COLUMNS][4];
  PA_UNROLL for (int n = 0; n < COLUMNS; n++) PA_UNROLL for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;

  int stage = 0;
  for (; base < end; base += TURN) {
    load(base + (STAGES - 1) * TURN, stage == 0 ? STAGES - 1 : stage - 1);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
    const T* keys = mine + stage * STAGE;
    const T* values = keys + TILE * PAD;
    float score[2][4];
    PA_UNROLL for (int n = 0; n < 2; n++) PA_UNROLL for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
    PA_UNROLL for (int s = 0; s < STEPS; s++) {
      unsigned b[4];
      pa_ldmatrix(b, keys + (lane % 8 + lane / 16 * 8) * PAD + s * 16 + lane / 8 % 2 * 8);
      pa_mma<T>(score[0], queries[s], b[0], b[1]);
      pa_mma<T>(score[1], queries[s], b[2], b[3]);
    }
    const bool edge = base + TILE > end || base < low;
    PA_UNROLL for (int n = 0; n < 2; n++) {
      PA_UNROLL for (int i = 0; i < 2 * HALVES; i++) {
        float x = score[n][i] * params[0];
        if (SOFTCAP) x = (1.0f - 2.0f / (PA_EXP2(2.0f * LOG2E * x) + 1.0f)) * params[2];
        const int token = base + n * 8 + c + i % 2;
        score[n][i] = edge && (token >= end || token < low) ? 4.0f * LOWEST : x;
      }
    }
    PA_UNROLL for (int h = 0; h < HALVES; h++) {
      float most = top[h];
      PA_UNROLL for (int n = 0; n < 2; n++) {
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
      PA_UNROLL for (int n = 0; n < 2; n++) {
        PA_UNROLL for (int i = 2 * h; i < 2 * h + 2; i++) {
          score[n][i] = PA_EXP2(score[n][i] - most);
          sum[h] += score[n][i];
        }
      }
    }
    unsigned p[4];
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const float* from = score[i / 2] + i % 2 * 2;
      p[i] = i % 2 < HALVES ? pa_pack<T>(from[0], from[1]) : 0u;
    }
    PA_UNROLL for (int n = 0; n < COLUMNS; n += 2) {
      unsigned b[4];
      pa_ldmatrix_trans(b, values + lane % 16 * PAD + n * 8 + lane / 16 * 8);
      pa_mma<T>(acc[n], p, b[0], b[1]);
      pa_mma<T>(acc[n + 1], p, b[2], b[3]);
    }
    __syncwarp();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // Merge the warps: their maxima, sums and outputs go through shared memory.
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  float* tops = (float*)pa_memory;
  float* sums = tops + WARPS * G;
  float* partial = sums + WARPS * G;
  PA_UNROLL for (int h = 0; h < HALVES; h++) {
    const int head = warp * G + r + h * 8;
    sum[h] += PA_XOR(sum[h], 1);
    sum[h] += PA_XOR(sum[h], 2);
    if (r + h * 8 >= G) continue;
    if (c == 0) tops[head] = top[h], sums[head] = sum[h];
    PA_UNROLL for (int n = 0; n < COLUMNS; n++) {
      partial[head * PAD + n * 8 + c] = acc[n][2 * h];
      partial[head * PAD + n * 8 + c + 1] = acc[n][2 * h + 1];
    }
  }
  __syncthreads();
  for (int x = threadIdx.x; x < G * D; x += WARPS * 32) {
    const int g = x / D, d = x % D;
    float highest = LOWEST, whole = 0.0f, o = 0.0f;
    PA_UNROLL for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, tops[w * G + g]);
    if (SINKS) {
      const float sink = float(sinks[kv_head * G + g]) * LOG2E;
      highest = fmaxf(highest, sink);
      whole = PA_EXP2(sink - highest);
    }
    PA_UNROLL for (int w = 0; w < WARPS; w++) {
      const float weight = PA_EXP2(tops[w * G + g] - highest);
      whole += sums[w * G + g] * weight;
      o += partial[(w * G + g) * PAD + d] * weight;
    }
    out[(heads_before + g) * D + d] = T(whole > 0.0f ? o / whole : 0.0f);
  }
