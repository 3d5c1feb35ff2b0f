  // The end of a norm: the elements * factor * factors, from the vector `first` of `out` on.
  PA_UNROLL for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + index;
    if (at < VECTORS) {
      Vec y;
      PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = T(float(kept[i].e[e]) * factor * float(factors[i].e[e]));
      ((PA_DEVICE Vec*)out)[first + at] = y;
    }
  }
