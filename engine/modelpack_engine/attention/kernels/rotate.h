  // A joint projection's queries, keys and values: queries and keys normed (QKNORM) and rotated; keys
  // and values go to their slots in place, as in write.h. A simdgroup a row and head.
  //   joint [PARTS, rows, (HQ + 2 * HK) * D] J   positions, slots [rows] int
  //   inverse [DIMS / 2] float, or with TABLE cosines and sines [rows, DIMS / 2, 2], factor included
  //   q_weight, k_weight [D] W: of the norms   EPSILON, FACTOR (of rotated elements): floats' bits
  //   k_pool, v_pool [pool slots, HK, D] P   previous [1] int: order only
  //   q [rows, HQ, D] T   token [1] int, always 0: orders what reads the pools afterwards
  constexpr int HEADS = HQ + 2 * HK, HALF = DIMS / 2, EACH = (D + 31) / 32;
  // Sum an element's parts, and round as the product would have been.
  #define PA_SUM(name, at) \
    float name = 0.0f; \
    PA_UNROLL for (int p = 0; p < PARTS; p++) name += float(from[p * part + at]); \
    name = float(T(name));
  const int lane = PA_LANE, unit = PA_X * NSG + PA_SIMD;
  const int row = unit / HEADS, head = unit % HEADS;
  if (unit == 0 && lane == 0) token[0] = 0;
  if (row < positions_shape[0]) {
    const PA_DEVICE J* from = joint + (size_t)unit * D;
    const size_t part = (size_t)positions_shape[0] * HEADS * D;
    const int slot = slots[row];
    if (head >= HQ + HK) {
      if (slot >= 0) {
        PA_DEVICE P* to = (PA_DEVICE P*)v_pool + ((size_t)slot * HK + head - HQ - HK) * D;
        for (int d = lane; d < D; d += 32) {
          PA_SUM(x, d)
          to[d] = P(x);
        }
      }
    } else {
      float factor = 1.0f;
      if (QKNORM) {
        float squares = 0.0f;
        for (int d = lane; d < D; d += 32) {
          PA_SUM(x, d)
          squares += x * x;
        }
        PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
        factor = PA_RSQRT(squares / D + pa_float(EPSILON));
      }
      const PA_DEVICE W* weight = head < HQ ? q_weight : k_weight;
      PA_DEVICE T* to_q = q + ((size_t)row * HQ + head) * D;
      PA_DEVICE P* to_k = (PA_DEVICE P*)k_pool + ((size_t)(slot < 0 ? 0 : slot) * HK + head - HQ) * D;
      const float position = float(positions[row]);
      for (int i = lane; i < HALF + D - DIMS; i += 32) {
        // Pairs first, then what is not rotated, which is a pair with itself.
        const int one = i >= HALF ? DIMS + i - HALF : INTERLEAVED ? 2 * i : i;
        const int two = i >= HALF ? one : INTERLEAVED ? one + 1 : one + HALF;
        PA_SUM(x, one)
        PA_SUM(y, two)
        if (QKNORM) {
          x = float(T(x * factor * float(weight[one])));
          y = float(T(y * factor * float(weight[two])));
        }
        if (i < HALF) {
          float c, s;
          if (TABLE) {
            const size_t at = ((size_t)row * HALF + i) * 2;
            c = inverse[at];
            s = inverse[at + 1];
          } else {
            const float angle = position * inverse[i];
            c = PA_COS(angle) * pa_float(FACTOR);
            s = PA_SIN(angle) * pa_float(FACTOR);
          }
          const float before = x;
          x = x * c - y * s;
          y = before * s + y * c;
        }
        if (head < HQ) {
          to_q[one] = T(x);
          to_q[two] = T(y);
        } else if (slot >= 0) {
          to_k[one] = P(float(T(x)));
          to_k[two] = P(float(T(y)));
        }
      }
    }
  }
