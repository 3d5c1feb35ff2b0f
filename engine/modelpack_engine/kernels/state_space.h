  // One token of selective state spaces (Mamba-2, https://arxiv.org/abs/2405.21060, in its recurrent
  // form): a simdgroup takes R channels of a head, each lane some of a channel's N states.
  //   x [rows, H, P] T   dt [rows, H] float   a [H] float: negative   b, c [rows, G, N] T   d [H] E
  //   state [rows, H, P, N] float
  //   y [rows, H, P] T   new_state = exp(a dt) state + dt x b, of which y = c new_state + d x
  constexpr int EACH = N / 32, UNITS = P / R;
  typedef PaVec<T, EACH> Vec;
  typedef PaVec<float, EACH> State;
  const int lane = PA_LANE, unit = PA_X * NSG + PA_SIMD;
  const int cell = unit / UNITS, row = cell / H, head = cell % H;
  if (row < x_shape[0]) {
    const size_t of_group = ((size_t)row * G + head / (H / G)) * 32 + lane;
    const Vec in = ((const PA_DEVICE Vec*)b)[of_group];
    const Vec out = ((const PA_DEVICE Vec*)c)[of_group];
    const float step = dt[cell], decay = PA_EXP2(a[head] * step * 1.44269504f);
    const float through = float(d[head]);
    const size_t first = (size_t)cell * P + unit % UNITS * R;
    float sums[R], inputs[R];
    PA_UNROLL for (int r = 0; r < R; r++) {
      State s = ((const PA_DEVICE State*)state)[(first + r) * 32 + lane];
      inputs[r] = float(x[first + r]);
      sums[r] = 0.0f;
      PA_UNROLL for (int e = 0; e < EACH; e++) {
        s.e[e] = s.e[e] * decay + inputs[r] * step * float(in.e[e]);
        sums[r] += s.e[e] * float(out.e[e]);
      }
      ((PA_DEVICE State*)new_state)[(first + r) * 32 + lane] = s;
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
      PA_UNROLL for (int r = 0; r < R; r++) sums[r] += PA_XOR(sums[r], mask);
    }
    if (lane == 0) {
      PA_UNROLL for (int r = 0; r < R; r++) y[first + r] = T(sums[r] + inputs[r] * through);
    }
  }
