  // Choose the K experts of each row, with their scores. One simdgroup per row: lane l has the experts
  // l, l + 32, …
  //   logits [rows, EXPERTS] L, or [PARTS, rows, EXPERTS] to be added up, and then T   bias [EXPERTS] B: for choosing only (SIGMOID)
  //   chosen [rows, K] uint   scores [rows, K] S
  //   SIGMOID: scores are sigmoids; of GROUPS of experts, the KEEP groups with the largest sums of two
  //   are used (others count as 0), and the best expert is first. Otherwise scores are the softmax in T,
  //   and the best expert is last.
  //   NORMED: scores are divided by their sum   FACTOR: float's bits, of scores
  constexpr int N = (EXPERTS + 31) / 32, SIZE = EXPERTS / GROUPS;
  constexpr float LOWEST = -1e30f, LOG2E = 1.4426950408889634f;
  const int row = PA_X * NSG + PA_SIMD, lane = PA_LANE;
  const int rows = logits_shape[PARTS > 1 ? 1 : 0];
  const bool there = row < rows;
  const size_t from = (size_t)(there ? row : 0) * EXPERTS;
  float score[N], value[N];  // experts are chosen by value
  int position[N];
  float top = LOWEST, sum = 0.0f;
  PA_UNROLL for (int n = 0; n < N; n++) {
    const int e = n * 32 + lane;
    score[n] = LOWEST;
    if (e < EXPERTS) {
      float logit = 0.0f;
      PA_UNROLL for (int p = 0; p < PARTS; p++) logit += float(logits[(size_t)p * rows * EXPERTS + from + e]);
      score[n] = float(T(logit));
    }
    top = score[n] > top ? score[n] : top;
    position[n] = -1;
  }
  if (SIGMOID) {
    PA_UNROLL for (int n = 0; n < N; n++) {
      const int e = n * 32 + lane;
      score[n] = 1.0f / (1.0f + PA_EXP2(-LOG2E * score[n]));
      value[n] = e < EXPERTS ? score[n] + float(bias[e]) : LOWEST;
    }
  } else {
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
      const float other = PA_XOR(top, mask);
      top = other > top ? other : top;
    }
    PA_UNROLL for (int n = 0; n < N; n++) {
      score[n] = n * 32 + lane < EXPERTS ? PA_EXP2(LOG2E * (score[n] - top)) : 0.0f;
      sum += score[n];
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    PA_UNROLL for (int n = 0; n < N; n++) {
      score[n] = float(T(score[n] / sum));
      value[n] = n * 32 + lane < EXPERTS ? score[n] : LOWEST;
    }
  }
  // NaN is chosen last: K experts must be chosen.
  PA_UNROLL for (int n = 0; n < N; n++) value[n] = value[n] >= LOWEST ? value[n] : LOWEST;
  if (GROUPS > 1) {
    float best[GROUPS];
    PA_UNROLL for (int g = 0; g < GROUPS; g++) {
      float one = LOWEST, two = LOWEST;
      PA_UNROLL for (int n = 0; n < N; n++) {
        const int e = n * 32 + lane;
        if (e < EXPERTS && e / SIZE == g) {
          two = value[n] > one ? one : value[n] > two ? value[n] : two;
          one = value[n] > one ? value[n] : one;
        }
      }
      PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
        const float first = PA_XOR(one, mask), second = PA_XOR(two, mask);
        const float lower = first < one ? first : one, higher = second > two ? second : two;
        one = first > one ? first : one;
        two = lower > higher ? lower : higher;
      }
      best[g] = one + (SIZE > 1 ? two : 0.0f);
    }
    PA_UNROLL for (int n = 0; n < N; n++) {
      const int e = n * 32 + lane;
      float own = 0.0f;
      PA_UNROLL for (int g = 0; g < GROUPS; g++) own = e / SIZE == g ? best[g] : own;
      int worse = 0;
      PA_UNROLL for (int g = 0; g < GROUPS; g++) {
        worse += best[g] < own || (best[g] == own && g < e / SIZE) ? 1 : 0;
      }
      if (e < EXPERTS && worse < GROUPS - KEEP) value[n] = 0.0f;
    }
  }
  // Choose the best, K times: the first of equal sigmoids, or the last of equal softmax values.
  sum = 0.0f;
  for (int k = 0; k < K; k++) {
    float most = LOWEST * 2.0f;
    int which = -1;
    PA_UNROLL for (int n = 0; n < N; n++) {
      const int e = n * 32 + lane;
      const bool better = SIGMOID ? value[n] > most : value[n] >= most;
      if (e < EXPERTS && position[n] < 0 && better) {
        most = value[n];
        which = e;
      }
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
      const float other = PA_XOR(most, mask);
      const int its = int(PA_XOR(which, mask));
      const bool wins = its >= 0 && (which < 0 || (SIGMOID ? its < which : its > which));
      if (other > most || (other == most && wins)) {
        most = other;
        which = its;
      }
    }
    PA_UNROLL for (int n = 0; n < N; n++) {
      if (n * 32 + lane == which) {
        position[n] = SIGMOID ? k : K - 1 - k;
        sum += score[n];
      }
    }
  }
  PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
  const float whole = SIGMOID ? sum : float(T(sum));
  PA_UNROLL for (int n = 0; n < N; n++) {
    if (there && position[n] >= 0) {
      const float found = NORMED ? score[n] / whole : score[n];
      chosen[(size_t)row * K + position[n]] = n * 32 + lane;
      scores[(size_t)row * K + position[n]] = S(SIGMOID ? found * pa_float(FACTOR) : found);
    }
  }
