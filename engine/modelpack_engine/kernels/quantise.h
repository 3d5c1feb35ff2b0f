  // Write new K and V rows to their slots in place, as write.h does, but quantised: all codes of a row,
  // then one word for each GROUP of elements, with its bias and scale. A thread quantises 8 elements;
  // the LANES of a group share its minimum and maximum.
  //   k [T, KW] R   v [T, VW] R   k_pool [slots, words] P   v_pool [slots, words] P   slots [T] int
  //   token [1] int
  constexpr int PART = 8, LANES = GROUP / PART, KN = KW / PART, N = (KW + VW) / PART;
  constexpr unsigned int TOP = (1u << BITS) - 1u, UPPER = 0xffff0000u, EXPONENT = 0x7f800000u;
  typedef PaVec<R, 4> From;
  const int row = PA_THREAD / N, at = PA_THREAD % N;
  const bool is_key = at < KN;
  const int part = is_key ? at : at - KN, width = is_key ? KW : VW;
  const bool exists = row < slots_shape[0];
  const int slot = exists ? slots[row] : -1;

  float x[PART];
  const PA_DEVICE R* from = (is_key ? k : v) + (exists ? (size_t)row * width + part * PART : 0);
  PA_UNROLL for (int i = 0; i < PART / 4; i++) {
    const From four = ((const PA_DEVICE From*)from)[i];
    PA_UNROLL for (int e = 0; e < 4; e++) x[i * 4 + e] = float(four.e[e]);
  }
  float low = x[0], high = x[0], wrong = 0.0f;
  PA_UNROLL for (int i = 0; i < PART; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    wrong = (pa_bits(x[i]) & EXPONENT) == EXPONENT ? 1.0f : wrong;
  }
  PA_UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
    const float lower = PA_XOR(low, mask), higher = PA_XOR(high, mask), worse = PA_XOR(wrong, mask);
    low = lower < low ? lower : low;
    high = higher > high ? higher : high;
    wrong = worse > wrong ? worse : wrong;
  }

  // The bias is rounded down and the scale up: the codes cover every element.
  const unsigned int low_bits = pa_bits(low);
  const unsigned int bias_bits = (low_bits + (low_bits >> 31) * 0xffffu) & UPPER;
  const float bias = pa_float(bias_bits);
  unsigned int step_bits = (pa_bits((high - bias) * (1.0f / float(TOP))) + 0xffffu) & UPPER;
  const float step = pa_float(step_bits);
  const float inverse = step > 1e-30f ? 1.0f / step : 0.0f;
  if (wrong > 0.0f) step_bits = 0x7fc00000u;  // NaN
  unsigned int words[PART * BITS / 32];
  PA_UNROLL for (int i = 0; i < PART * BITS / 32; i++) words[i] = 0u;
  PA_UNROLL for (int i = 0; i < PART; i++) {
    const float code = wrong > 0.0f ? 0.0f : (x[i] - bias) * inverse + 0.5f;
    const unsigned int whole = code < float(TOP) ? (unsigned int)(code) : TOP;
    words[i * BITS / 32] |= whole << (i * BITS % 32);
  }
  if (slot >= 0) {
    const int codes = width * BITS / 32;
    PA_DEVICE P* to = (PA_DEVICE P*)(is_key ? k_pool : v_pool) + (size_t)slot * (codes + width / GROUP);
    PA_UNROLL for (int i = 0; i < PART * BITS / 32; i++) {
      to[part * (PART * BITS / 32) + i] = P(words[i]);
    }
    if (part % LANES == 0) to[codes + part / LANES] = P(bias_bits | (step_bits >> 16));
  }
  if (PA_THREAD == 0) token[0] = 0;
