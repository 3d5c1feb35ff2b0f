  // What a row's adapter adds to the parts of a product; `chunks`, `shrink` and `expand` come before.
  //   given [PARTS, rows, OUT] J   x, down, slots: see `shrink`   up: see `expand`
  //   out [rows, OUT] T   GATED: of two layers, out [rows, OUT / 2] = silu(the first's) * the second's
  typedef PaVec<J, TO> Given;
  typedef PaVec<T, TO> Out;
  const size_t rows = slots_shape[0];
  PA_UNROLL for (int turn = 0; turn < TURNS; turn++) {
    const int at = start / TO + turn * NSG * 32 + own_thread;
    if (at < stop / TO) {
      PA_UNROLL for (int l = 0; l < BOTH; l++) {
        PA_UNROLL for (int part = 0; part < PARTS; part++) {
          const Given y = ((const PA_DEVICE Given*)given)[(part * rows + own_row) * LINE + l * (LINE / 2) + at];
          PA_UNROLL for (int e = 0; e < TO; e++) changes[turn][l][e] += float(y.e[e]);
        }
      }
    }
  }
  // Not above: no load passes a store.
  PA_UNROLL for (int turn = 0; turn < TURNS; turn++) {
    const int at = start / TO + turn * NSG * 32 + own_thread;
    if (at < stop / TO) {
      Out y;
      PA_UNROLL for (int e = 0; e < TO; e++) {
        y.e[e] = T(changes[turn][0][e]);
        if (GATED) {
          const float g = float(y.e[e]);
          const float value = float(T(changes[turn][BOTH - 1][e]));
          y.e[e] = T(float(T(g / (1.0f + PA_EXP2(-1.44269504f * g)))) * value);
        }
      }
      ((PA_DEVICE Out*)out)[(size_t)own_row * (LINE / BOTH) + at] = y;
    }
  }
