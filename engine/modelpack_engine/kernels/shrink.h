  // A row times the first matrix of its adapter: `inner` has the products of RANKS columns, STEP at a time.
  //   x [rows, IN] T   down [slots, N, IN] A   slots [rows] int: 0 is no adapter
  // The kernel may be launched early only directly after a product that was itself not launched early: all that
  // came before the product has ended then, x too, and this reads x while the product still runs.
  PA_LET_NEXT_START();
#ifdef PA_CHUNKS
  const int own_row = block;
#else
  constexpr int OUT = D, TO = VEC, CHUNK = D, RANK = RANKS, start = 0, stop = D;
  constexpr bool GATED = false;
  const int own_row = PA_X, product = 0;
#endif
  constexpr int STEP = 8, LOADS = IN / FROM;
  typedef PaVec<T, FROM> From;
  typedef PaVec<A, FROM> Down;
  const int own_lane = PA_LANE, own_group = PA_SIMD, own_thread = own_group * 32 + own_lane;
  const int slot = slots[own_row];
  PA_SHARED(float, products, NSG * STEP);
  PA_SHARED(float, inner, RANKS);
  for (int first = 0; first < RANKS && slot > 0; first += STEP) {
    float sums[STEP];
    PA_UNROLL for (int i = 0; i < STEP; i++) sums[i] = 0.0f;
    const PA_DEVICE Down* by = (const PA_DEVICE Down*)down + ((size_t)slot * N + product + first) * LOADS;
    for (int at = own_thread; at < LOADS; at += NSG * 32) {
      const From values = ((const PA_DEVICE From*)x)[(size_t)own_row * LOADS + at];
      PA_UNROLL for (int i = 0; i < STEP; i++) {
        const Down factors = by[(size_t)i * LOADS + at];
        PA_UNROLL for (int e = 0; e < FROM; e++) sums[i] += float(values.e[e]) * float(factors.e[e]);
      }
    }
    // Half of the lanes go on with half of the sums, until each has one: 9 exchanges for 8 sums.
    PA_UNROLL for (int step = 0; step < 5; step++) {
      const int mask = 16 >> step, rest = STEP >> (step + 1);
      const bool high = (own_lane & mask) != 0;
      PA_UNROLL for (int i = 0; i < rest; i++) {
        const float other = high ? sums[i] : sums[rest + i];
        sums[i] = (high ? sums[rest + i] : sums[i]) + PA_XOR(other, mask);
      }
      if (rest == 0) sums[0] += PA_XOR(sums[0], mask);
    }
    if (own_lane % (32 / STEP) == 0) products[own_group * STEP + own_lane / (32 / STEP)] = sums[0];
    PA_SYNC();
    if (own_thread < STEP) {
      float sum = 0.0f;
      PA_UNROLL for (int s = 0; s < NSG; s++) sum += products[s * STEP + own_thread];
      inner[first + own_thread] = sum;
    }
    PA_SYNC();
  }
