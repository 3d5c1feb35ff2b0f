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
  // With PA_ROTATES, see rotate_decode.h.
  PA_LET_NEXT_START();
#ifndef PA_ROTATES
  PA_WAIT_FOR_BEFORE();
#endif
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

  const int last = end > 0 ? end - 1 : 0;

  // The query rows, scaled, in the order in which the lanes will want them.
  PA_SHARED(QVec, queries, HEADS * QROW);
#ifdef PA_ROTATES
  // The row's own key and value, and the angles of a lane's pairs: none depends on the kernel before.
  PA_SHARED(Vec, own_key, DK / VEC);
  PA_SHARED(Vec, own_value, DV / VEC);
  const int own_token = context_lens[row] - 1, slot = slots[row];
  float cosines[EACH], sines[EACH];
  PA_UNROLL for (int n = 0; n < EACH; n++) {
    const int run = n * 32 + lane;
    const float angle = float(positions[row]) * (run < TURNED ? inverse[run] : 0.0f);
    cosines[n] = PA_COS(angle) * pa_float(FACTOR);
    sines[n] = PA_SIN(angle) * pa_float(FACTOR);
  }
#else
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
#endif

  float most[HEADS], sum[HEADS], acc[HEADS][VN * VEC];
  PA_UNROLL for (int g = 0; g < HEADS; g++) {
    most[g] = LOWEST;
    sum[g] = 0.0f;
    PA_UNROLL for (int x = 0; x < VN * VEC; x++) acc[g][x] = 0.0f;
  }

  int base = start + group * CHUNK;
  int block = base < end ? block_tables[(size_t)row * width + base / BLOCK] : 0;
#ifdef PA_ROTATES
  for (bool first = true; first || base < end; first = false, base += TURN) {
#else
  for (; base < end; base += TURN) {
#endif
    const int ahead = base + TURN;
    const int next = ahead < end ? block_tables[(size_t)row * width + ahead / BLOCK] : 0;
    Vec k_read[STEPS][KN], v_read[STEPS][VN];
    P k_group[STEPS][KN], v_group[STEPS][VN];
    float bias[STEPS];  // far below every score where there is no token to attend to
    PA_UNROLL for (int u = 0; u < STEPS; u++) {
      const int wanted = base + u * TPW + sub;
      const int token = wanted < low ? low : wanted < end ? wanted : last;
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
#ifdef PA_ROTATES
    if (first) {
      PA_WAIT_FOR_BEFORE();
      constexpr int WIDTH = HK * (G + 2 - OWN_VALUES);
      const size_t joint_size = (size_t)positions_shape[0] * WIDTH * DK;
      PA_UNROLL for (int turn = 0; turn < HEADS + 2; turn += NSG) {
        const int head = turn + group, kind = head < HEADS ? 0 : head - HEADS + 1;  // query, key, value
        const bool from_values = OWN_VALUES && kind == 2, there = kind < 3;
        const int column = kind == 0 ? kv_head * G + first_head + head : HK * (G + kind - 1) + kv_head;
        const PA_DEVICE J* from = joint + ((size_t)row * WIDTH + (there && !from_values ? column : 0)) * DK;
        float x[EACH][2];
        int begin[EACH], second[EACH];
        float squares = 0.0f;
        PA_UNROLL for (int n = 0; n < EACH; n++) {
          const int run = n * 32 + lane;
          const bool apart = run < TURNED && !INTERLEAVED;
          begin[n] = run >= RUNS ? 0 : apart ? run : run * 2;
          second[n] = begin[n] + (apart ? TURNED : 1);
          x[n][0] = x[n][1] = 0.0f;
          if (from_values) {
            const PA_DEVICE A* value = values + ((size_t)row * HK + kv_head) * DK;
            x[n][0] = float(value[begin[n]]);
            x[n][1] = float(value[second[n]]);
          } else {
            PA_UNROLL for (int p = 0; p < PARTS; p++) {
              x[n][0] += float(from[p * joint_size + begin[n]]);
              x[n][1] += float(from[p * joint_size + second[n]]);
            }
          }
          PA_UNROLL for (int e = 0; e < 2; e++) {  // round as a separate matmul would
            x[n][e] = run < RUNS ? float(T(x[n][e])) : 0.0f;
            squares += x[n][e] * x[n][e];
          }
        }
        if (QKNORM) {
          PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
          const float factor = PA_RSQRT(squares / DK + pa_float(EPSILON));
          const PA_DEVICE W* weight = kind == 0 ? q_weight : k_weight;
          PA_UNROLL for (int n = 0; n < EACH; n++) {
            PA_UNROLL for (int e = 0; e < 2; e++) {
              if (kind < 2) x[n][e] = float(T(x[n][e] * factor * float(weight[e ? second[n] : begin[n]])));
            }
          }
        }
        PA_UNROLL for (int n = 0; n < EACH; n++) {
          const int run = n * 32 + lane;
          if (kind < 2 && run < TURNED) {
            const float before = x[n][0];
            x[n][0] = before * cosines[n] - x[n][1] * sines[n];
            x[n][1] = before * sines[n] + x[n][1] * cosines[n];
          }
          PA_UNROLL for (int e = 0; e < 2; e++) {
            const int d = e ? second[n] : begin[n], vector = d / VEC, within = d % VEC;
            const float value = float(T(x[n][e]));
            if (run < RUNS && kind == 0) {
              const int piece = vector / LPT * (VEC / QV) + within / QV;
              queries[head * QROW + piece * LPT + vector % LPT].e[within % QV] = value * params[0];
            }
            if (run < RUNS && kind == 1) own_key[vector].e[within] = P(value);
            if (run < RUNS && kind == 2) own_value[vector].e[within] = P(value);
          }
        }
      }
      PA_SYNC();
      // One of the threadgroups with the row's own token writes it.
      if (PA_X % GROUPS == 0 && slot >= 0 && start <= own_token && own_token < end && index < DK / VEC) {
        ((PA_DEVICE Vec*)((PA_DEVICE P*)k_pool + (size_t)slot * KROW + kv_head * KHEAD))[index] = own_key[index];
        ((PA_DEVICE Vec*)((PA_DEVICE P*)v_pool + (size_t)slot * VROW + kv_head * VHEAD))[index] = own_value[index];
      }
      if (PA_X == 0 && row == 0 && part == 0 && index == 0) token[0] = 0;
    }
    PA_UNROLL for (int u = 0; u < STEPS; u++) {
      if (base + u * TPW + sub >= own_token) {  // also where there is no token: no others' numbers
        PA_UNROLL for (int i = 0; i < KN; i++) k_read[u][i] = own_key[i * LPT + at];
        PA_UNROLL for (int i = 0; i < VN; i++) v_read[u][i] = own_value[i * LPT + at];
      }
    }
#endif
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
