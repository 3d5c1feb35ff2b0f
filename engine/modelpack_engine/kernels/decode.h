  // Attention of one query row a sequence over its blocks. A threadgroup serves HEADS query heads of
  // one KV head, one row, one part of the context; NSG simdgroups take chunks of CHUNK tokens in turn.
  // In a simdgroup LPT lanes share a token, VEC elements each, so TPW tokens are read side by side,
  // STEPS times over. K and V are read once for all heads. Scores are in base 2 (log2 e is in params).
  //   q [B, HK*G, DK] T   k_pool [slots, HK, DK] P   v_pool [slots, HK, DV] P
  //   BITS: quantised, pools are [slots, words] P: codes of all heads, then a word for each GROUP of them
  //   LATENT: V is the first DV elements of K, and keys go on with DX elements in v_pool, whose
  //   queries are q_more [B, HK*G, DX] T
  //   block_tables [B, width] int   context_lens [B] int   sinks [HK*G] S   written [1]: order only
  //   params [3] float: factors of q, of q_more, and of a score after tanh
  //   out [B, HK*G, DV] O, or with SPLIT: out [B, HK*G, parts, DV] O, not yet divided, and
  //   stats [B, HK*G, parts, 2] float: maximum and sum
  PA_LET_NEXT_START();
  PA_WAIT_FOR_BEFORE();
  constexpr int D = DK + DX, TPW = 32 / LPT, CHUNK = TPW * STEPS, TURN = NSG * CHUNK, THREADS = NSG * 32;
  constexpr int KN = (D / VEC + LPT - 1) / LPT, VN = (DV / VEC + LPT - 1) / LPT;
  constexpr int GROUPS = (G + HEADS - 1) / HEADS;
  constexpr int QV = VEC < 4 ? VEC : 4, QN = KN * (VEC / QV), QROW = QN * LPT;
  constexpr int OROW = VN * VEC * LPT, OSUB = OROW + LPT;  // LPT more: subgroups hit other banks
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  // Elements of P in a head of a pool's row, and in a row.
  constexpr int KHEAD = BITS ? DK * BITS / 32 : DK, KROW = HK * KHEAD + (BITS ? HK * DK / GROUP : 0);
  constexpr int VWIDTH = LATENT ? DX : DV, VHEAD = BITS ? VWIDTH * BITS / 32 : VWIDTH;
  constexpr int VROW = HK * VHEAD + (BITS ? HK * VWIDTH / GROUP : 0);
  typedef PaElements<P, VEC, BITS> Elements;
  typedef typename Elements::Packed Vec;
  typedef typename Elements::Wide Wide;
  typedef PaVec<float, QV> QVec;

  const int lane = PA_LANE, group = PA_SIMD, index = group * 32 + lane;
  const int sub = lane / LPT, at = lane % LPT;
  const int kv_head = PA_X / GROUPS, first_head = (PA_X % GROUPS) * HEADS;
  const int row = PA_Y, part = PA_Z, parts = PA_DEPTH;
  const size_t heads_before = (size_t)row * (HK * G) + kv_head * G + first_head;

  const int width = block_tables_shape[1];
  int end = context_lens[row];
  if (end > width * BLOCK) end = width * BLOCK;
  int low = WINDOW > 0 && end > WINDOW ? end - WINDOW : 0;
  int start = low / CHUNK * CHUNK;
  if (SPLIT) {  // equal shares of this row's context, in whole turns
    const int share = ((end - start + parts - 1) / parts + TURN - 1) / TURN * TURN;
    start += part * share;
    if (low < start) low = start;
    if (end > start + share) end = start + share;
  }

  // The query rows, scaled, in the order in which the lanes will want them.
  PA_SHARED(QVec, queries, HEADS * QROW);
  for (int x = index; x < HEADS * QROW * QV; x += THREADS) {
    const int g = x / (QROW * QV), y = x % (QROW * QV);  // y: (vector, quarter, lane, element)
    const int piece = y / (LPT * QV), l = y / QV % LPT, e = y % QV;
    const int d = ((piece / (VEC / QV)) * LPT + l) * VEC + piece % (VEC / QV) * QV + e;
    float value = 0.0f;
    if (first_head + g < G) {
      if (d < DK) value = float(q[(heads_before + g) * DK + d]) * params[0];
      if (d >= DK && d < D) value = float(q_more[(heads_before + g) * DX + d - DK]) * params[1];
    }
    queries[g * QROW + piece * LPT + l].e[e] = value;
  }
  PA_SYNC();

  float most[HEADS], sum[HEADS], acc[HEADS][VN * VEC];
  PA_UNROLL for (int g = 0; g < HEADS; g++) {
    most[g] = LOWEST;
    sum[g] = 0.0f;
    PA_UNROLL for (int x = 0; x < VN * VEC; x++) acc[g][x] = 0.0f;
  }

  int base = start + group * CHUNK;
  int block = base < end ? block_tables[(size_t)row * width + base / BLOCK] : 0;
  for (; base < end; base += TURN) {
    const int ahead = base + TURN;
    const int next = ahead < end ? block_tables[(size_t)row * width + ahead / BLOCK] : 0;
    Vec k_read[STEPS][KN], v_read[STEPS][VN];
    P k_group[STEPS][KN], v_group[STEPS][VN];
    float bias[STEPS];  // far below every score where there is no token to attend to
    PA_UNROLL for (int u = 0; u < STEPS; u++) {
      const int wanted = base + u * TPW + sub;
      const int token = wanted < low ? low : wanted < end ? wanted : end - 1;
      bias[u] = token == wanted ? 0.0f : 4.0f * LOWEST;
      const size_t slot = (size_t)block * BLOCK + token % BLOCK;
      const PA_DEVICE P* k_row = k_pool + slot * KROW;
      const PA_DEVICE P* v_row = v_pool + slot * VROW;
      const PA_DEVICE Vec* k_line = (const PA_DEVICE Vec*)(k_row + kv_head * KHEAD);
      const PA_DEVICE Vec* v_line = (const PA_DEVICE Vec*)(v_row + kv_head * VHEAD);
      PA_UNROLL for (int i = 0; i < KN; i++) {
        const int v = i * LPT + at;
        const PA_DEVICE Vec* from = v < DK / VEC || DX == 0 ? k_line + v : v_line + v - DK / VEC;
        k_read[u][i] = v < D / VEC ? *from : *k_line;
        if (BITS) {
          const int group = kv_head * (DK / GROUP) + (v < D / VEC ? v * VEC / GROUP : 0);
          k_group[u][i] = k_row[HK * KHEAD + group];
        }
      }
      PA_UNROLL for (int i = 0; !LATENT && i < VN; i++) {
        const int v = i * LPT + at;
        v_read[u][i] = v < DV / VEC ? v_line[v] : *v_line;
        if (BITS) {
          const int group = kv_head * (DV / GROUP) + (v < DV / VEC ? v * VEC / GROUP : 0);
          v_group[u][i] = v_row[HK * VHEAD + group];
        }
      }
    }
    Wide keys[STEPS][KN], values[STEPS][VN];
    PA_UNROLL for (int u = 0; u < STEPS; u++) {
      PA_UNROLL for (int i = 0; i < KN; i++) {
        keys[u][i] = Elements::wide(k_read[u][i], k_group[u][i]);
      }
    }
    float score[HEADS][STEPS];
    PA_UNROLL for (int g = 0; g < HEADS; g++) {
      PA_UNROLL for (int u = 0; u < STEPS; u++) score[g][u] = SOFTCAP ? 0.0f : bias[u];
      PA_UNROLL for (int i = 0; i < QN; i++) {
        const QVec piece = queries[g * QROW + i * LPT + at];
        PA_UNROLL for (int u = 0; u < STEPS; u++) {
          PA_UNROLL for (int e = 0; e < QV; e++) {
            score[g][u] += piece.e[e] * float(keys[u][i * QV / VEC].e[i * QV % VEC + e]);
          }
        }
      }
    }
    PA_UNROLL for (int mask = LPT / 2; mask > 0; mask /= 2) {
      PA_UNROLL for (int g = 0; g < HEADS; g++) {
        PA_UNROLL for (int u = 0; u < STEPS; u++) score[g][u] += PA_XOR(score[g][u], mask);
      }
    }
    PA_UNROLL for (int u = 0; u < STEPS; u++) {
      PA_UNROLL for (int i = 0; i < VN; i++) {  // LATENT: V is the beginning of K
        if (LATENT) values[u][i] = keys[u][i];
        if (!LATENT) values[u][i] = Elements::wide(v_read[u][i], v_group[u][i]);
      }
    }
    PA_UNROLL for (int g = 0; g < HEADS; g++) {
      float top = most[g];
      PA_UNROLL for (int u = 0; u < STEPS; u++) {
        if (SOFTCAP) {  // tanh, exact at both infinities
          const float t = 1.0f - 2.0f / (PA_EXP2(2.0f * LOG2E * score[g][u]) + 1.0f);
          score[g][u] = t * params[2] + bias[u];
        }
        top = score[g][u] > top ? score[g][u] : top;
      }
      const float keep = PA_EXP2(most[g] - top);
      most[g] = top;
      sum[g] *= keep;
      PA_UNROLL for (int x = 0; x < VN * VEC; x++) acc[g][x] *= keep;
      PA_UNROLL for (int u = 0; u < STEPS; u++) {
        const float p = PA_EXP2(score[g][u] - top);
        sum[g] += p;
        PA_UNROLL for (int i = 0; i < VN; i++) {
          PA_UNROLL for (int e = 0; e < VEC; e++) {
            acc[g][i * VEC + e] += p * float(values[u][i].e[e]);
          }
        }
      }
    }
    block = next;
  }

  // Merge lanes' subgroups, then simdgroups: one head at a time, through either half of the memory.
  PA_SHARED(float, partial, 2 * NSG * TPW * OSUB);
  PA_SHARED(float, tops, 2 * NSG);
  PA_SHARED(float, sums, 2 * NSG);
  PA_UNROLL for (int g = 0; g < HEADS; g++) {
    const int side = g % 2 * NSG;
    float top = most[g];
    PA_UNROLL for (int mask = LPT; mask < 32; mask *= 2) {
      const float other = PA_XOR(top, mask);
      top = other > top ? other : top;
    }
    const float keep = PA_EXP2(most[g] - top);
    float total = sum[g] * keep;
    PA_UNROLL for (int mask = LPT; mask < 32; mask *= 2) total += PA_XOR(total, mask);
    PA_UNROLL for (int x = 0; x < VN * VEC; x++) {
      partial[((side + group) * TPW + sub) * OSUB + x * LPT + at] = acc[g][x] * keep;
    }
    if (lane == 0) {
      tops[side + group] = top;
      sums[side + group] = total;
    }
    PA_SYNC();
    if (first_head + g < G) {
      const size_t head = heads_before + g;
      float highest = LOWEST, whole = 0.0f, weights[NSG];
      PA_UNROLL for (int s = 0; s < NSG; s++) {
        highest = tops[side + s] > highest ? tops[side + s] : highest;
      }
      if (SINKS && !SPLIT) {
        const float sink = float(sinks[kv_head * G + first_head + g]) * LOG2E;
        highest = sink > highest ? sink : highest;
        whole = PA_EXP2(sink - highest);
      }
      PA_UNROLL for (int s = 0; s < NSG; s++) {
        weights[s] = PA_EXP2(tops[side + s] - highest);
        whole += sums[side + s] * weights[s];
      }
      for (int x = index; x < OROW; x += THREADS) {
        const int d = (x / LPT / VEC * LPT + x % LPT) * VEC + x / LPT % VEC;
        float o = 0.0f;
        PA_UNROLL for (int s = 0; s < NSG; s++) {
          float from = 0.0f;
          PA_UNROLL for (int t = 0; t < TPW; t++) from += partial[((side + s) * TPW + t) * OSUB + x];
          o += from * weights[s];
        }
        if (d < DV && SPLIT) out[(head * parts + part) * DV + d] = O(o);
        if (d < DV && !SPLIT) out[head * DV + d] = O(whole > 0.0f ? o / whole : 0.0f);
      }
      if (SPLIT && index == 0) {
        stats[(head * parts + part) * 2] = highest;
        stats[(head * parts + part) * 2 + 1] = whole;
      }
    }
  }
