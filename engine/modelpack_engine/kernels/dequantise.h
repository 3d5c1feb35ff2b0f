  // Dequantise affine quantised weights: each thread writes eight consecutive elements.
  //   weight [N, K * BITS / 32] uint, low bits first   scales, biases [N, K / GROUP] T   out [N, K] T
  constexpr int WORDS = BITS / 4, PER = K / 8;
  typedef PaVec<T, 8> Vec;
  typedef PaVec<uint32_t, WORDS> Words;
  const int at = PA_THREAD;
  if (at < weight_shape[0] * PER) {
    const Words words = ((const PA_DEVICE Words*)weight)[at];
    const int group = at / PER * (K / GROUP) + at % PER * 8 / GROUP;
    const float scale = float(scales[group]), bias = float(biases[group]);
    Vec y;
    PA_UNROLL for (int e = 0; e < 8; e++) {
      const uint32_t q = words.e[e * BITS / 32] >> (e * BITS % 32) & ((1u << BITS) - 1);
      y.e[e] = T(float(q) * scale + bias);
    }
    ((PA_DEVICE Vec*)out)[at] = y;
  }
