  // Selective state spaces of steps that have prompts, on tensor cores (CUDA only). A block computes WIDTH channels
  // of a head of a segment, in chunks of up to 64 rows (https://arxiv.org/abs/2405.21060, section 6). With s the sums
  // of a dt up to each row of a chunk:
  //   y_i = exp(s_i) c_i state + sum over j <= i of exp(s_i - s_j) dt_j (c_i b_j) x_j + d x_i
  //   state = exp(s_last) state + sum over j of exp(s_last - s_j) dt_j x_j b_j
  // Operands of matmuls have 16 bits; the state stays in registers as float32. Segments of up to FEW rows, and
  // those that share rows, are computed row by row in float32, as by state_space.h, which describes the arguments.
  constexpr int ROWS = 64, WARPS = 4, THREADS = WARPS * 32, UNITS = P / WIDTH, DEPTH = N / 16, OWN = N / WARPS;
  constexpr int TALL = WIDTH / 16, TILES = OWN / 8, PAIRS = TALL * 2 * TILES;  // a warp has OWN columns of the state
  constexpr int LINE = N + 8, SHORT = WIDTH + 8, STAGE = ROWS * (2 * LINE + SHORT);  // padded: no bank conflicts
  typedef PaVec<T, 2> Pair;
  typedef PaVec<float, 2> Cells;
  extern __shared__ __align__(1024) unsigned char pa_memory[];
  PA_SHARED(float, scalars, 2 * 3 * ROWS);
  PA_SHARED(float, parts, 2 * WARPS * WIDTH);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, r = lane / 4, q = lane % 4 * 2;
  const int head = PA_X / UNITS % H, first = PA_X % UNITS * WIDTH, strip = warp * 16, own = warp * OWN;
  // The lines and columns that lanes pass to ldmatrix: its second matrix is below the first, or right of it.
  const int below = lane % 16, right = lane / 16 * 8, below2 = lane / 16 * 8 + lane % 8, right2 = lane / 8 % 2 * 8;
  // Prompts follow single rows and take longest, so the last segments come first.
  const int segment = segments_shape[0] - PA_X / (UNITS * H);
  if (segment == segments_shape[0]) {  // rows without a segment
    for (int row = thread; row < owners_shape[0]; row += THREADS) {
      for (int i = 0; i < WIDTH && owners[row] < 0; i++) y[((size_t)row * H + head) * P + first + i] = T(0.0f);
    }
    return;
  }
  const int source = segments[segment * 6], start = segments[segment * 6 + 1], count = segments[segment * 6 + 2];
  const int marked = segments[segment * 6 + 3], slot = segments[segment * 6 + 4];
  if (count < 0) return;
  const bool is_long = count > FEW && owners[start] == segment;  // and has rows of its own
  const float rate = a[head] * 1.44269504f, through = float(d[head]);

  float s[TALL][TILES][4];  // as the results of mma: a lane has pairs of columns of channels 8 apart
  auto place = [&](size_t index, int i) {
    return ((index * H + head) * P + first + i / TILES * 8 + r) * N + own + i % TILES * 8 + q;
  };
  auto store = [&](float* to, size_t index) {
    PA_UNROLL for (int i = 0; i < PAIRS; i++) {
      const float* const cell = s[i / TILES / 2][i % TILES] + i / TILES % 2 * 2;
      *(Cells*)(to + place(index, i)) = {{cell[0], cell[1]}};
    }
  };
  PA_UNROLL for (int i = 0; i < PAIRS; i++) {
    const size_t from = place(source < -1 ? -2 - source : source, i);
    Cells cell = {{0.0f, 0.0f}};
    if (source != -1) cell = *(const Cells*)((source < -1 ? pool : state) + from);
    PA_UNROLL for (int e = 0; e < 2; e++) s[i / TILES / 2][i % TILES][i / TILES % 2 * 2 + e] = cell.e[e];
  }
  auto end_of = [&](int from) {  // of a chunk: also at the mark
    const int to = from + ROWS < count ? from + ROWS : count;
    return from < marked && marked < to ? marked : to;
  };
  T* const narrow = (T*)pa_memory;  // the state before a chunk, in 16 bits
  float raw[2];                     // in the first warp: the steps of two rows of a chunk
  auto load = [&](int stage, int from, int there) {
    T* const to = narrow + WIDTH * LINE + stage * STAGE;
    const size_t token = (size_t)start + from;
    auto copy = [&](T* lines, const T* given, int pitch, int width) {  // rows after the last repeat the first, with weight 0
      for (int at = thread; at < (is_long ? ROWS : there) * (width / 8); at += THREADS) {
        const int row = at / (width / 8), i = at % (width / 8) * 8;
        pa_copy16(lines + row * (width + 8) + i, given + (token + (row < there ? row : 0)) * pitch + i);
      }
    };
    copy(to, b + B_AT + head / (H / G) * N, GROUPS, N);
    copy(to + ROWS * LINE, c + C_AT + head / (H / G) * N, GROUPS, N);
    copy(to + ROWS * LINE * 2, x + X_AT + head * P + first, INPUTS, WIDTH);
    pa_copies_commit();
    PA_UNROLL for (int i = 0; i < 2; i++) {
      const S* const step = dt + (token + lane * 2 + i) * (RAW ? STEPS : H) + (RAW ? DT_AT : 0) + head;
      if (warp == 0 && lane * 2 + i < there) raw[i] = float(*step) + (RAW ? biases[head] : 0.0f);
    }
  };
  auto add_up = [&](int stage, int there) {  // by the first warp: sums of steps; rows after the last have none
    float step[2];
    PA_UNROLL for (int i = 0; i < 2; i++) {
      step[i] = lane * 2 + i < there ? raw[i] : 0.0f;
      if (RAW && lane * 2 + i < there) {
        step[i] = raw[i] > 0.0f ? raw[i] : 0.0f;
        step[i] += PA_LOG(1.0f + PA_EXP2(1.44269504f * (raw[i] > 0.0f ? -raw[i] : raw[i])));
        step[i] = step[i] < pa_float(LOW) ? pa_float(LOW) : step[i];
        step[i] = step[i] > pa_float(HIGH) ? pa_float(HIGH) : step[i];
      }
    }
    float total = rate * (step[0] + step[1]), sum = total;
    PA_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
      const float other = PA_XOR(total, mask);
      if (lane & mask) sum += other;
      total += other;
    }
    PA_UNROLL for (int i = 0; i < 2; i++) {
      float* const to = scalars + stage * 3 * ROWS + lane * 2 + i;
      to[0] = i ? sum : sum - rate * step[1];
      to[ROWS] = step[i];
      to[2 * ROWS] = PA_EXP2(total - to[0]) * step[i];
    }
  };
  auto multiply = [&](float (*to)[4], const unsigned (&by)[4], const T* lines, bool transposed) {  // 16x16
    unsigned found[4];
    if (transposed) pa_ldmatrix_trans(found, lines);
    else pa_ldmatrix(found, lines);
    pa_mma<T>(to[0], by, found[0], found[1]);
    pa_mma<T>(to[1], by, found[2], found[3]);
  };
  int from = 0, to = count > 0 ? end_of(0) : 0;
  if (count > 0) load(0, 0, to);
  if (count > 0 && warp == 0) add_up(0, to);
  for (int stage = 0; from < count; stage ^= 1) {
    const T* const in = narrow + WIDTH * LINE + stage * STAGE;  // rows of b, c and x
    const T* const out = in + ROWS * LINE;
    const T* const input = out + ROWS * LINE;
    const float* const sums = scalars + stage * 3 * ROWS;
    const float* const steps = sums + ROWS;
    const float* const weights = steps + ROWS;
    const int there = to - from, next = to < count ? end_of(to) : to;
    T* const to_y = y + (((size_t)start + from) * H + head) * P + first;
    PA_UNROLL for (int i = 0; i < PAIRS && is_long; i++) {
      const float* const cell = s[i / TILES / 2][i % TILES] + i / TILES % 2 * 2;
      *(unsigned*)(narrow + (i / TILES * 8 + r) * LINE + own + i % TILES * 8 + q) = pa_pack<T>(cell[0], cell[1]);
    }
    pa_copies_wait<0>();
    PA_SYNC();  // also: the other stage is no longer read
    if (to < count) load(stage ^ 1, to, next - to);
    for (int row = 0; row < there && !is_long; row++) {
      const float decay = PA_EXP2(rate * steps[row]);
      float* const part = parts + row % 2 * WARPS * WIDTH;
      float found[TALL * 2] = {};
      PA_UNROLL for (int i = 0; i < TILES * 2; i++) {
        const int at = row * LINE + own + i / 2 * 8 + q + i % 2;
        const float entering = steps[row] * float(in[at]), leaving = float(out[at]);
        PA_UNROLL for (int m = 0; m < TALL * 2; m++) {
          float& cell = s[m / 2][i / 2][m % 2 * 2 + i % 2];
          cell = cell * decay + float(input[row * SHORT + m * 8 + r]) * entering;
          found[m] += cell * leaving;
        }
      }
      PA_UNROLL for (int m = 0; m < TALL * 2; m++) {
        found[m] += PA_XOR(found[m], 1);
        found[m] += PA_XOR(found[m], 2);
        if (q == 0) part[warp * WIDTH + m * 8 + r] = found[m];
      }
      PA_SYNC();
      if (thread < WIDTH) {
        float sum = through * float(input[row * SHORT + thread]);
        PA_UNROLL for (int w = 0; w < WARPS; w++) sum += part[w * WIDTH + thread];
        to_y[(size_t)row * H * P + thread] = T(sum);
      }
    }
    if (is_long) {
      // Outputs, of 16 rows by each warp: what the state before the chunk adds.
      unsigned ours[DEPTH][4];
      float acc[TALL * 2][4] = {};
      PA_UNROLL for (int k = 0; k < DEPTH; k++) {
        pa_ldmatrix(ours[k], out + (strip + below) * LINE + k * 16 + right);
        PA_UNROLL for (int m = 0; m < TALL; m++) {
          multiply(acc + m * 2, ours[k], narrow + (m * 16 + below2) * LINE + k * 16 + right2, false);
        }
      }
      const float until[2] = {sums[strip + r], sums[strip + r + 8]};
      PA_UNROLL for (int i = 0; i < TALL * 8; i++) acc[i / 4][i % 4] *= PA_EXP2(until[i % 4 / 2]);
      // What the chunk's rows add, 32 at a time.
      PA_UNROLL for (int base = 0; base < ROWS; base += 32) {
        if (base > strip) continue;
        float scores[4][4] = {};
        PA_UNROLL for (int k = 0; k < DEPTH; k++) {
          PA_UNROLL for (int n = 0; n < 4; n += 2) {
            multiply(scores + n, ours[k], in + (base + n * 8 + below2) * LINE + k * 16 + right2, false);
          }
        }
        PA_UNROLL for (int i = 0; i < 16; i++) {
          const int row = strip + r + i % 4 / 2 * 8, other = base + i / 4 * 8 + q + i % 2;
          const float weight = PA_EXP2(until[i % 4 / 2] - sums[other]) * steps[other];
          scores[i / 4][i % 4] = other <= row ? scores[i / 4][i % 4] * weight : 0.0f;
        }
        PA_UNROLL for (int n = 0; n < 4; n += 2) {
          unsigned pairs[4];
          PA_UNROLL for (int i = 0; i < 4; i++) {
            pairs[i] = pa_pack<T>(scores[n + i / 2][i % 2 * 2], scores[n + i / 2][i % 2 * 2 + 1]);
          }
          PA_UNROLL for (int m = 0; m < TALL; m++) {
            multiply(acc + m * 2, pairs, input + (base + n * 8 + below) * SHORT + m * 16 + right, true);
          }
        }
      }
      PA_UNROLL for (int i = 0; i < TALL * 4; i++) {
        const int row = strip + r + i % 2 * 8, at = i / 2 * 8 + q;
        const Pair given = *(const Pair*)(input + row * SHORT + at);
        const float* const sum = acc[i / 2] + i % 2 * 2;
        const float low = sum[0] + through * float(given.e[0]), high = sum[1] + through * float(given.e[1]);
        if (row < there) *(unsigned*)(to_y + (size_t)row * H * P + at) = pa_pack<T>(low, high);
      }
      // The state after the chunk.
      const float decay = PA_EXP2(sums[ROWS - 1]);
      PA_UNROLL for (int i = 0; i < PAIRS * 2; i++) s[i / 4 / TILES][i / 4 % TILES][i % 4] *= decay;
      PA_UNROLL for (int k = 0; k < ROWS; k += 16) {
        PA_UNROLL for (int m = 0; m < TALL; m++) {
          unsigned entering[4];
          pa_ldmatrix_trans(entering, input + (k + below2) * SHORT + m * 16 + right2);
          PA_UNROLL for (int i = 0; i < 4; i++) {
            const Pair given = *(const Pair*)&entering[i];
            const float* const weight = weights + k + i / 2 * 8 + q;
            entering[i] = pa_pack<T>(float(given.e[0]) * weight[0], float(given.e[1]) * weight[1]);
          }
          PA_UNROLL for (int tile = 0; tile < TILES; tile += 2) {
            multiply(s[m] + tile, entering, in + (k + below) * LINE + own + tile * 8 + right, true);
          }
        }
      }
      PA_SYNC();  // the state before the chunk is no longer read
    }
    if (to == marked) store((float*)pool, slot);
    if (warp == 0 && to < count) add_up(stage ^ 1, next - to);
    from = to;
    to = next;
  }
  store((float*)state, segments[segment * 6 + 5]);
