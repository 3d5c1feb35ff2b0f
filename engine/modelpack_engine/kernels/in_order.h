  // The end of a norm: the elements * factor * factors, in the order of `packed_wide` (order.h); CUDA only.
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + index;
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      if (at >= VECTORS) continue;
      const float value = float(kept[i].e[e]) * factor * float(factors[i].e[e]);
      out[PaOrder<BITS>::at(at * VEC + e, PA_X, a_shape[0])] = T(value);
    }
  }
