  // The factor of a norm: each lane has `kept` elements, their `factors` and the sum of their `squares`.
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
  PA_SHARED(float, partial, NSG);
  if (lane == 0) partial[group] = squares;
  PA_SYNC();
  squares = 0.0f;
  PA_UNROLL for (int s = 0; s < NSG; s++) squares += partial[s];
  const float factor = PA_RSQRT(squares / D + pa_float(EPSILON));
