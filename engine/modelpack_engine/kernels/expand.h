  // That times the second matrix: `changes` has what the row's adapter adds to the outputs of this thread, vectors
  // of TO from `start` to `stop`. `shrink` comes before.
  //   up [slots, RANK, OUT] A   GATED: outputs of two layers, each of OUT / 2
#define PA_EXPANDED
  constexpr int BOTH = GATED ? 2 : 1, LINE = OUT / TO, TURNS = (CHUNK / TO + NSG * 32 - 1) / (NSG * 32);
  typedef PaVec<A, TO> Up;
  float changes[TURNS][BOTH][TO];
  PA_UNROLL for (int turn = 0; turn < TURNS; turn++) {
    const int at = start / TO + turn * NSG * 32 + own_thread;
    PA_UNROLL for (int l = 0; l < BOTH; l++) {
      PA_UNROLL for (int e = 0; e < TO; e++) changes[turn][l][e] = 0.0f;
      const PA_DEVICE Up* by = (const PA_DEVICE Up*)up + (size_t)slot * RANK * LINE + l * (LINE / 2) + at;
      for (int first = 0; first < RANK && slot > 0 && at < stop / TO; first += STEP) {
        PA_UNROLL for (int i = 0; i < STEP; i++) {
          const Up factors = by[(size_t)(first + i) * LINE];
          const float value = inner[l * RANK + first + i];
          PA_UNROLL for (int e = 0; e < TO; e++) changes[turn][l][e] += value * float(factors.e[e]);
        }
      }
    }
  }
  // Only now are parts of the product read, and results written, whose memory may have been another array's.
  PA_WAIT_FOR_BEFORE();
