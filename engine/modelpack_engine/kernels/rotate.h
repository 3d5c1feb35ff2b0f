  // Split a joint projection into queries, keys and values: norm (QKNORM) and rotate queries and keys,
  // and write keys and values to their slots in place, as write.h does. LPH lanes share a row's head;
  // each rotates VEC pairs of elements at a time.
  //   joint [PARTS, rows, ((1 + GATED) * HQ + 2 * HK) * D] J: if GATED, D columns after each query are
  //   not used; with OWN_VALUES, it has no values
  //   values [rows, HK * D] A, with OWN_VALUES   positions, slots [rows] int
  //   inverse [DIMS / 2] float, or with TABLE cosines and sines [rows, DIMS / 2, 2], factor included
  //   q_weight, k_weight [D] W: of the norms   EPSILON, FACTOR (of rotated elements): floats' bits
  //   k_pool, v_pool [pool slots, HK, D] P   previous [1] int: order only
  //   q [rows, HQ, D] T   token [1] int, always 0: orders later readers of the pools
  PA_LET_NEXT_START();
  PA_WAIT_FOR_BEFORE();
  constexpr int HEADS = HQ + 2 * HK, HALF = DIMS / 2;
  // Runs of VEC pairs: the rotated ones, then the others, whose pairing does not matter.
  constexpr int TURNED = HALF / VEC, RUNS = TURNED + (D - DIMS) / (2 * VEC);
  constexpr int EACH = (RUNS + LPH - 1) / LPH;
  typedef PaVec<J, VEC> From;
  const int lane = PA_LANE % LPH, unit = (PA_X * NSG + PA_SIMD) * (32 / LPH) + PA_LANE / LPH;
  const bool there = unit < positions_shape[0] * HEADS;
  const int row = there ? unit / HEADS : 0, head = there ? unit % HEADS : 0;
  if (PA_X == 0 && PA_SIMD == 0 && PA_LANE == 0) token[0] = 0;
  constexpr int WIDTH = HEADS + GATED * HQ - OWN_VALUES * HK;
  const size_t part = (size_t)positions_shape[0] * WIDTH * D;
  const int column = head < HQ ? (1 + GATED) * head : head + GATED * HQ;
  const PA_DEVICE J* from = joint + ((size_t)row * WIDTH + column) * D;
  const int slot = slots[row], kind = head < HQ ? 0 : head < HQ + HK ? 1 : 2;  // query, key, value
  const bool from_values = OWN_VALUES && kind == 2;

  // The start of a run's two vectors: interleaved pairs are within a vector, others across both.
  float x[EACH][2 * VEC];
  int begin[EACH], second[EACH];
  PA_UNROLL for (int n = 0; n < EACH; n++) {
    const int run = n * LPH + lane;
    const bool apart = run < TURNED && !INTERLEAVED;
    begin[n] = apart ? run * VEC : run * 2 * VEC;
    if (run >= RUNS) begin[n] = 0;
    second[n] = begin[n] + (apart ? HALF : VEC);
    PA_UNROLL for (int e = 0; e < 2 * VEC; e++) x[n][e] = 0.0f;
    if (from_values) {
      const PA_DEVICE A* value = values + ((size_t)row * HK + head - HQ - HK) * D;
      const PaVec<A, VEC> a = *(const PA_DEVICE PaVec<A, VEC>*)(value + begin[n]);
      const PaVec<A, VEC> b = *(const PA_DEVICE PaVec<A, VEC>*)(value + second[n]);
      PA_UNROLL for (int e = 0; e < VEC; e++) x[n][e] = float(a.e[e]), x[n][VEC + e] = float(b.e[e]);
    } else {
      PA_UNROLL for (int p = 0; p < PARTS; p++) {
        const From a = *(const PA_DEVICE From*)(from + p * part + begin[n]);
        const From b = *(const PA_DEVICE From*)(from + p * part + second[n]);
        PA_UNROLL for (int e = 0; e < VEC; e++) {
          x[n][e] += float(a.e[e]);
          x[n][VEC + e] += float(b.e[e]);
        }
      }
    }
    // Round as a separate matmul would.
    PA_UNROLL for (int e = 0; e < 2 * VEC; e++) x[n][e] = run < RUNS ? float(T(x[n][e])) : 0.0f;
  }
  if (QKNORM) {
    float squares = 0.0f;
    PA_UNROLL for (int n = 0; n < EACH; n++) {
      PA_UNROLL for (int e = 0; e < 2 * VEC; e++) squares += x[n][e] * x[n][e];
    }
    PA_UNROLL for (int mask = LPH / 2; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
    const float factor = PA_RSQRT(squares / D + pa_float(EPSILON));
    const PA_DEVICE W* weight = kind == 0 ? q_weight : k_weight;
    PA_UNROLL for (int n = 0; n < EACH; n++) {
      PA_UNROLL for (int e = 0; e < 2 * VEC; e++) {
        const int at = e < VEC ? begin[n] + e : second[n] + e - VEC;
        if (kind < 2) x[n][e] = float(T(x[n][e] * factor * float(weight[at])));
      }
    }
  }
  const float position = float(positions[row]);
  PA_UNROLL for (int n = 0; n < EACH; n++) {
    const int run = n * LPH + lane;
    PA_UNROLL for (int i = 0; i < VEC; i++) {
      if (run < TURNED && kind < 2) {
        float c, s;
        if (TABLE) {
          const size_t at = ((size_t)row * HALF + run * VEC + i) * 2;
          c = inverse[at];
          s = inverse[at + 1];
        } else {
          const float angle = position * inverse[run * VEC + i];
          c = PA_COS(angle) * pa_float(FACTOR);
          s = PA_SIN(angle) * pa_float(FACTOR);
        }
        const int one = INTERLEAVED ? 2 * i : i, two = INTERLEAVED ? 2 * i + 1 : VEC + i;
        const float before = x[n][one], y = x[n][two];
        x[n][one] = before * c - y * s;
        x[n][two] = before * s + y * c;
      }
    }
    if (there && run < RUNS && kind == 0) {
      PaVec<T, VEC> a, b;
      PA_UNROLL for (int e = 0; e < VEC; e++) a.e[e] = T(x[n][e]), b.e[e] = T(x[n][VEC + e]);
      PA_DEVICE T* to = q + ((size_t)row * HQ + head) * D;
      *(PA_DEVICE PaVec<T, VEC>*)(to + begin[n]) = a;
      *(PA_DEVICE PaVec<T, VEC>*)(to + second[n]) = b;
    }
    if (there && run < RUNS && kind > 0 && slot >= 0) {
      PaVec<P, VEC> a, b;
      PA_UNROLL for (int e = 0; e < VEC; e++) {
        a.e[e] = P(float(T(x[n][e])));
        b.e[e] = P(float(T(x[n][VEC + e])));
      }
      PA_DEVICE P* pool = (PA_DEVICE P*)(kind == 1 ? k_pool : v_pool);
      PA_DEVICE P* to = pool + ((size_t)slot * HK + head - HQ - (kind - 1) * HK) * D;
      *(PA_DEVICE PaVec<P, VEC>*)(to + begin[n]) = a;
      *(PA_DEVICE PaVec<P, VEC>*)(to + second[n]) = b;
    }
  }
