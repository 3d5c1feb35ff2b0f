  // Draw a token for each row among those that min-p, top-k and top-p keep: one threadgroup per row.
  //   logits [R, V] T   token [R] int: the most likely if the temperature is 0, or -1 if the row has NaN or
  //   its maximum is infinite   next [R] int: the same, with 0 for -1
  //   settings [R, 6] int: floats' bits (temperature, log of min-p, top-p, top-k: V or more for all), and a key
  // The lowest kept logit is searched among floats, with LIMITS candidates at a time: each counts the
  // logits above it, or their mass. By the Gumbel-max trick, the largest sum of logit and noise wins.
  // The noise is made of MLX's random numbers, Threefry 2x32 (https://doi.org/10.1145/2063384.2063405).
  // The order of sums is fixed.
  constexpr int THREADS = NSG * 32, HALF = (V + 1) / 2, LIMITS = 13, SUMS = LIMITS + 3;
  const float lowest = pa_float(0xff800000u);
  float set[4];
  PA_UNROLL for (int i = 0; i < 4; i++) set[i] = pa_float((unsigned int)settings[PA_X * 6 + i]);
  const float temperature = set[0], min_p = set[1], share = set[2], top_k = set[3];
  const bool draws = temperature > 0.0f;
  const float scale = 1.4426950408889634f / (draws ? temperature : 1.0f);
  typedef PaVec<T, VEC> Vec;
  PA_SHARED(float, partial, SUMS * NSG);
  PA_SHARED(float, whole, SUMS);
  const int row = PA_X, lane = PA_LANE, group = PA_SIMD, index = group * 32 + lane;
  const size_t from = (size_t)row * V;
  const PA_DEVICE Vec* vectors = (const PA_DEVICE Vec*)(logits + from);

  float top = lowest, low = -lowest;  // the highest, and the lowest above -infinity
  float broken = 0.0f;
  for (int i = index; i < V / VEC; i += THREADS) {
    const Vec x = vectors[i];
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      const float value = float(x.e[e]);
      top = value > top ? value : top;
      low = value > lowest && value < low ? value : low;
      if (!(value < -lowest)) broken = 1.0f;  // NaN too
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float higher = PA_XOR(top, mask), lower = PA_XOR(low, mask), bad = PA_XOR(broken, mask);
    top = higher > top ? higher : top;
    low = lower < low ? lower : low;
    broken = bad > broken ? bad : broken;
  }
  if (lane == 0) {
    partial[group] = top;
    partial[NSG + group] = low;
    partial[2 * NSG + group] = broken;
  }
  PA_SYNC();
  PA_UNROLL for (int s = 0; s < NSG; s++) {
    top = partial[s] > top ? partial[s] : top;
    low = partial[NSG + s] < low ? partial[NSG + s] : low;
    broken = partial[2 * NSG + s] > broken ? partial[2 * NSG + s] : broken;
  }
  PA_SYNC();

  float least = draws ? top + min_p * temperature : top;
  least = least > low ? least : low;
  for (int stage = draws ? 0 : 2; stage < 2; stage++) {  // top-k, then top-p among what that and min-p keep
    const bool by_mass = stage == 1;
    if (by_mass ? share >= 1.0f : top_k >= V) continue;
    // The limit looked for is `last`, or from `first` on below it.
    unsigned int first = pa_ordered(by_mass ? least : low) >> SHIFT, last = pa_ordered(top) >> SHIFT;
    while (first < last) {
      const unsigned int step = (last - first) / (LIMITS + 1) + 1u;
      float limit[LIMITS], sum[SUMS];
      PA_UNROLL for (int s = 0; s < SUMS; s++) sum[s] = 0.0f;
      PA_UNROLL for (int s = 0; s < LIMITS; s++) {
        const unsigned int at = first + (unsigned int)(s + 1) * step - 1u;
        limit[s] = pa_unordered(at < last ? at : last, SHIFT);
      }
      for (int i = index; i < V / VEC; i += THREADS) {
        const Vec x = vectors[i];
        PA_UNROLL for (int e = 0; e < VEC; e++) {
          const float value = float(x.e[e]), mass = by_mass ? PA_EXP2((value - top) * scale) : 1.0f;
          PA_UNROLL for (int s = 0; s < LIMITS; s++) sum[s] += value > limit[s] ? mass : 0.0f;
          sum[LIMITS] += value > least ? mass : 0.0f;
          sum[LIMITS + 1] += value > least ? 1.0f : 0.0f;
          sum[LIMITS + 2] += value == least ? 1.0f : 0.0f;
        }
      }
      PA_UNROLL for (int s = 0; s < SUMS; s++) {
        PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sum[s] += PA_XOR(sum[s], mask);
        if (lane == 0) partial[s * NSG + group] = sum[s];
      }
      PA_SYNC();
      for (int s = group; s < SUMS; s += NSG) {
        float all = lane < NSG ? partial[s * NSG + lane] : 0.0f;
        PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) all += PA_XOR(all, mask);
        if (lane == 0) whole[s] = all;
      }
      PA_SYNC();
      float most = top_k;
      if (by_mass) {
        // Of those that equal the least, top-k keeps as many as it has room for.
        const float room = most - whole[LIMITS + 1], same = whole[LIMITS + 2];
        most = whole[LIMITS] + (same < room ? same : room) * PA_EXP2((least - top) * scale);
        most *= share;
      }
      int found = LIMITS;
      PA_UNROLL for (int s = LIMITS - 1; s >= 0; s--) found = whole[s] < most ? s : found;
      first += (unsigned int)found * step;
      if (found < LIMITS && first + step - 1u < last) last = first + step - 1u;
      PA_SYNC();
    }
    const float limit = pa_unordered(last, SHIFT);
    least = limit > least ? limit : least;
  }

  float best = lowest;
  int which = V;
  for (int at = index; at < HALF; at += THREADS) {
    const bool two = at + HALF < V;
    const float values[2] = {float(logits[from + at]), two ? float(logits[from + at + HALF]) : lowest};
    if (!(values[0] >= least) && !(values[1] >= least)) continue;
    const unsigned int key[2] = {(unsigned int)settings[row * 6 + 4], (unsigned int)settings[row * 6 + 5]};
    const unsigned int parts[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bdau};
    unsigned int random[2] = {(unsigned int)at + key[0], (two ? (unsigned int)(at + HALF) : 0u) + key[1]};
    PA_UNROLL for (int round = 0; round < 5; round++) {
      PA_UNROLL for (int turn = 0; turn < 4; turn++) {
        const unsigned int by = ((round % 2 ? 0x18101d11u : 0x061a0f0du) >> (turn * 8)) & 0xffu;
        random[0] += random[1];
        random[1] = ((random[1] << by) | (random[1] >> (32u - by))) ^ random[0];
      }
      random[0] += parts[(round + 1) % 3];
      random[1] += parts[(round + 2) % 3] + (unsigned int)(round + 1);
    }
    PA_UNROLL for (int side = 0; side < 2; side++) {
      if (!(values[side] >= least)) continue;
      float u = float(random[side]) * 2.3283064365386963e-10f;
      u = u < 0.99999994f ? u : 0.99999994f;
      u = u > 1.1641532182693481e-10f ? u : 1.1641532182693481e-10f;
      // log(1 - u), as exact near 0 as u is.
      const float rest = 1.0f - u, lost = rest - 1.0f;
      const float logarithm = lost == 0.0f ? -u : PA_LOG(rest) * (-u / lost);
      const float sum = draws ? values[side] / temperature - PA_LOG(-logarithm) : values[side];
      if (sum > best) {
        best = sum;
        which = at + side * HALF;
      }
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float other = PA_XOR(best, mask);
    const int its = int(PA_XOR(float(which), mask));
    if (other > best || (other == best && its < which)) {
      best = other;
      which = its;
    }
  }
  PA_SYNC();
  if (lane == 0) {
    partial[group] = best;
    partial[NSG + group] = float(which);
  }
  PA_SYNC();
  PA_UNROLL for (int s = 0; s < NSG; s++) {
    const int its = int(partial[NSG + s]);
    if (partial[s] > best || (partial[s] == best && its < which)) {
      best = partial[s];
      which = its;
    }
  }
  if (index == 0) {
    const int found = broken == 0.0f && which < V ? which : -1;
    token[row] = found;
    next[row] = found < 0 ? 0 : found;
  }
