  // The most likely column of each row, the first of equal ones: one threadgroup per row.
  //   logits [R, V] T   In lane 0 of the first simdgroup, `best` is -1 if the row has NaN or its maximum is infinite.
  typedef PaVec<T, VEC> Vec;
  constexpr int THREADS = NSG * 32;
  const float infinity = pa_float(0x7f800000u);
  const int row = PA_X, lane = PA_LANE, group = PA_SIMD, index = group * 32 + lane;
  const PA_DEVICE Vec* vectors = (const PA_DEVICE Vec*)(logits + (size_t)row * V);
  float top = -infinity;
  int at = V, broken = 0;
  for (int i = index; i < V / VEC; i += THREADS) {
    const Vec x = vectors[i];
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      const float value = float(x.e[e]);
      if (value > top) {
        top = value;
        at = i * VEC + e;
      }
      if (!(value < infinity)) broken = 1;  // NaN too
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float other = PA_XOR(top, mask);
    const int place = PA_XOR(at, mask), bad = PA_XOR(broken, mask);
    if (other > top || (other == top && place < at)) {
      top = other;
      at = place;
    }
    broken = broken > bad ? broken : bad;
  }
  PA_SHARED(float, tops, NSG);
  PA_SHARED(int, places, NSG);
  PA_SHARED(int, faults, NSG);
  if (lane == 0) {
    tops[group] = top;
    places[group] = at;
    faults[group] = broken;
  }
  PA_SYNC();
  int best = -1;
  if (index == 0) {
    for (int s = 1; s < NSG; s++) {
      if (tops[s] > top || (tops[s] == top && places[s] < at)) {
        top = tops[s];
        at = places[s];
      }
      broken = broken > faults[s] ? broken : faults[s];
    }
    if (broken == 0 && at < V) best = at;
  }
