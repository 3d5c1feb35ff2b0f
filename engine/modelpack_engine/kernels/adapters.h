  // What a row's adapter adds to the parts of a product; `chunks` and `shrink` come before.
  //   given [PARTS, rows, OUT] J   x, down, slots: see `shrink`   up [slots, RANK, OUT] A
  //   out [rows, OUT] T   GATED: of two layers, out [rows, OUT / 2] = silu(the first's) * the second's
  constexpr int BOTH = GATED ? 2 : 1, EACH = OUT / TO;
  typedef PaVec<A, TO> Up;
  typedef PaVec<J, TO> Given;
  typedef PaVec<T, TO> Out;
  const size_t rows = slots_shape[0];
  for (int at = start / TO + own_thread; at < stop / TO; at += NSG * 32) {
    float sums[BOTH][TO];
    PA_UNROLL for (int l = 0; l < BOTH; l++) {
      PA_UNROLL for (int e = 0; e < TO; e++) sums[l][e] = 0.0f;
      PA_UNROLL for (int part = 0; part < PARTS; part++) {
        const Given y = ((const PA_DEVICE Given*)given)[(part * rows + own_row) * EACH + l * (EACH / 2) + at];
        PA_UNROLL for (int e = 0; e < TO; e++) sums[l][e] += float(y.e[e]);
      }
      const PA_DEVICE Up* by = (const PA_DEVICE Up*)up + (size_t)slot * RANK * EACH + l * (EACH / 2) + at;
      for (int first = 0; first < RANK && slot > 0; first += STEP) {
        PA_UNROLL for (int i = 0; i < STEP; i++) {
          const Up factors = by[(size_t)(first + i) * EACH];
          const float value = inner[l * RANK + first + i];
          PA_UNROLL for (int e = 0; e < TO; e++) sums[l][e] += value * float(factors.e[e]);
        }
      }
    }
    Out y;
    PA_UNROLL for (int e = 0; e < TO; e++) {
      y.e[e] = T(sums[0][e]);
      if (GATED) {
        const float g = float(y.e[e]);
        y.e[e] = T(float(T(g / (1.0f + PA_EXP2(-1.44269504f * g)))) * float(T(sums[BOTH - 1][e])));
      }
    }
    ((PA_DEVICE Out*)out)[(size_t)own_row * (EACH / BOTH) + at] = y;
  }
