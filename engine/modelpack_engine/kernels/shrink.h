  // A row times the first matrix of its adapter: `inner` has the products of RANKS columns.
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
  constexpr int LOADS = IN / FROM;
  typedef PaVec<T, FROM> From;
  typedef PaVec<A, FROM> Down;
  const int own_lane = PA_LANE, own_group = PA_SIMD, own_thread = own_group * 32 + own_lane;
  const int slot = slots[own_row];
  PA_SHARED(float, inner, RANKS);
  // A simdgroup multiplies by STEP columns at a time, and has AHEAD loads of each in flight.
  for (int first = own_group * STEP; first < RANKS && slot > 0; first += NSG * STEP) {
    float sums[STEP];
    PA_UNROLL for (int i = 0; i < STEP; i++) sums[i] = 0.0f;
    const PA_DEVICE Down* by = (const PA_DEVICE Down*)down + ((size_t)slot * N + product + first) * LOADS;
    for (int from = own_lane; from < LOADS; from += AHEAD * 32) {
      From values[AHEAD];
      Down factors[AHEAD][STEP];
      PA_UNROLL for (int ahead = 0; ahead < AHEAD; ahead++) {
        const int at = from + ahead * 32, there = LOADS % (AHEAD * 32) == 0 || at < LOADS ? at : 0;
        values[ahead] = ((const PA_DEVICE From*)x)[(size_t)own_row * LOADS + there];
        PA_UNROLL for (int i = 0; i < STEP; i++) factors[ahead][i] = by[(size_t)i * LOADS + there];
      }
      PA_UNROLL for (int ahead = 0; ahead < AHEAD; ahead++) {
        if (LOADS % (AHEAD * 32) == 0 || from + ahead * 32 < LOADS) {
          PA_UNROLL for (int i = 0; i < STEP; i++) {
            PA_UNROLL for (int e = 0; e < FROM; e++) {
              sums[i] += float(values[ahead].e[e]) * float(factors[ahead][i].e[e]);
            }
          }
        }
      }
    }
    PA_UNROLL for (int i = 0; i < STEP; i++) {
      PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sums[i] += PA_XOR(sums[i], mask);
      if (own_lane == 0) inner[first + i] = sums[i];
    }
  }
  PA_SYNC();
