  // The end of a norm: each lane has `kept` elements, their `factors` and the sum of their `squares`.
  //   out: the elements / rms of all * factors, from the vector `first` on
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
  PA_SHARED(float, partial, NSG);
  if (lane == 0) partial[group] = squares;
  PA_SYNC();
  squares = 0.0f;
  PA_UNROLL for (int s = 0; s < NSG; s++) squares += partial[s];
  const float factor = PA_RSQRT(squares / D + pa_float(EPSILON));
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + index;
    if (at < VECTORS) {
      Vec y;
      PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = T(float(kept[i].e[e]) * factor * float(factors[i].e[e]));
      ((PA_DEVICE Vec*)out)[first + at] = y;
    }
  }
