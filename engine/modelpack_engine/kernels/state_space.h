  // Selective state spaces (Mamba-2, https://arxiv.org/abs/2405.21060, in its recurrent form), token
  // by token. LANES lanes share a channel, whose states stay in registers, and have R channels.
  // `segments` is `Segments.runs` of attention/metadata.py.
  //   x [rows, INPUTS] T: H * P columns from X_AT on   b, c [rows, GROUPS] T: G * N from B_AT and C_AT on
  //   dt [rows, H] float; if RAW, [rows, STEPS] S from DT_AT on, and dt = softplus(dt + biases) within
  //   LOW and HIGH, floats' bits   biases [H] float   a [H] float: negative   d [H] E
  //   state [states, H, P, N] float   pool [slots, H, P, N] float; both are written in place
  //   segments [segments, 6] int   owners [rows] int
  //   y [rows, H, P] T
  // For each row: state = exp(a dt) state + dt x b, of which y = c state + d x.
  constexpr int LANES = 4, VEC = 4, EACH = N / (LANES * VEC), ROWS = 32 / LANES * R;
  constexpr int UNITS = (P + ROWS - 1) / ROWS;
  typedef PaVec<T, VEC> Vec;
  typedef PaVec<float, VEC> State;
  const int unit = PA_X * NSG + PA_SIMD, part = PA_LANE % LANES;
  const int cell = unit / UNITS, segment = cell / H, head = cell % H;
  const int first = unit % UNITS * ROWS + PA_LANE / LANES;  // channels are 32 / LANES apart
  const int source = segment < segments_shape[0] ? segments[segment * 6] : -1;
  const int start = segment < segments_shape[0] ? segments[segment * 6 + 1] : 0;
  const int count = segment < segments_shape[0] ? segments[segment * 6 + 2] : -1;
  if (count >= 0) {
    const int marked = segments[segment * 6 + 3], slot = segments[segment * 6 + 4], to = segments[segment * 6 + 5];
    const PA_DEVICE State* const before = (const PA_DEVICE State*)(source < -1 ? pool : state);
    const size_t from = source < -1 ? -2 - source : source;
    const float rate = a[head] * 1.44269504f, through = float(d[head]);
    State s[R][EACH];
    PA_UNROLL for (int r = 0; r < R; r++) {
      const int row = first + r * 32 / LANES;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        PA_UNROLL for (int e = 0; e < VEC; e++) s[r][i].e[e] = 0.0f;
        if (source != -1 && row < P) s[r][i] = before[(((from * H + head) * P + row) * EACH + i) * LANES + part];
      }
    }
    Vec in[EACH], out[EACH], next_in[EACH], next_out[EACH];
    float input[R], next_input[R], step = 0.0f, next_step = 0.0f;
    for (int t = -1; t < count; t++) {
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        in[i] = next_in[i];
        out[i] = next_out[i];
      }
      step = next_step;
      PA_UNROLL for (int r = 0; r < R; r++) input[r] = next_input[r];
      if (t + 1 < count) {  // reads ahead, while the sums below wait for each other
        const size_t token = (size_t)start + t + 1;
        const PA_DEVICE Vec* ins = (const PA_DEVICE Vec*)(b + token * GROUPS + B_AT);
        const PA_DEVICE Vec* outs = (const PA_DEVICE Vec*)(c + token * GROUPS + C_AT);
        PA_UNROLL for (int i = 0; i < EACH; i++) {
          const int index = (head / (H / G) * EACH + i) * LANES + part;
          next_in[i] = ins[index];
          next_out[i] = outs[index];
        }
        if (RAW) {
          const float raw = float(dt[token * STEPS + DT_AT + head]) + biases[head], low = raw > 0.0f ? -raw : raw;
          next_step = (raw > 0.0f ? raw : 0.0f) + PA_LOG(1.0f + PA_EXP2(1.44269504f * low));
          next_step = next_step < pa_float(LOW) ? pa_float(LOW) : next_step;
          next_step = next_step > pa_float(HIGH) ? pa_float(HIGH) : next_step;
        } else {
          next_step = float(dt[token * H + head]);
        }
        PA_UNROLL for (int r = 0; r < R; r++) {
          const int row = first + r * 32 / LANES;
          next_input[r] = row < P ? float(x[token * INPUTS + X_AT + head * P + row]) : 0.0f;
        }
      }
      if (t < 0) continue;
      const float decay = PA_EXP2(rate * step);
      float sums[R];
      PA_UNROLL for (int r = 0; r < R; r++) sums[r] = 0.0f;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        PA_UNROLL for (int e = 0; e < VEC; e++) {
          const float entering = step * float(in[i].e[e]), leaving = float(out[i].e[e]);
          PA_UNROLL for (int r = 0; r < R; r++) {
            s[r][i].e[e] = s[r][i].e[e] * decay + input[r] * entering;
            sums[r] += s[r][i].e[e] * leaving;
          }
        }
      }
      PA_UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
        PA_UNROLL for (int r = 0; r < R; r++) sums[r] += PA_XOR(sums[r], mask);
      }
      PA_UNROLL for (int r = 0; r < R; r++) {
        const int row = first + r * 32 / LANES;
        const size_t at = (((size_t)start + t) * H + head) * P + row;
        if (part == 0 && row < P) y[at] = T(sums[r] + input[r] * through);
      }
      if (t + 1 == marked) {
        PA_UNROLL for (int r = 0; r < R; r++) {
          const int row = first + r * 32 / LANES;
          PA_UNROLL for (int i = 0; i < EACH; i++) {
            const size_t at = (((size_t)slot * H + head) * P + row) * EACH + i;
            if (row < P) ((PA_DEVICE State*)pool)[at * LANES + part] = s[r][i];
          }
        }
      }
    }
    PA_UNROLL for (int r = 0; r < R; r++) {
      const int row = first + r * 32 / LANES;
      PA_UNROLL for (int i = 0; i < EACH; i++) {
        const size_t at = (((size_t)to * H + head) * P + row) * EACH + i;
        if (row < P) ((PA_DEVICE State*)state)[at * LANES + part] = s[r][i];
      }
    }
  } else if (segment == segments_shape[0]) {  // rows without a segment
    for (int row = PA_LANE; row < owners_shape[0]; row += 32) {
      const int column = unit % UNITS * ROWS;
      if (owners[row] < 0) {
        for (int i = column; i < column + ROWS && i < P; i++) y[((size_t)row * H + head) * P + i] = T(0.0f);
      }
    }
  }
