  // Matmuls of few rows with weights in block types (blocks.h), by dot products: a simdgroup computes
  // LINES outputs of ROWS rows. With EACH > 0, weights are those of experts, a row has EACH of them, and ROWS is 1.
  //   x [M, K] T   weight [N, words of a row] uint   bias [N] T (BIAS)   out [M, N] O
  //   EACH: weight [experts, N, words]   bias [experts, N]   chosen [M * EACH] uint   out [M * EACH, N]
  //   LOW, HIGH, GROUP, BLOCK, SCALED, MINS, EXPONENT: of the type; a code stands for code - ZERO, or with a TABLE or
  //   EXPONENT, for one of 16 values
  typedef typename Codes::Low Low;
  typedef typename Codes::High High;
  typedef PaVec<T, 8> Eight;
  // Codes are read with OFFSET added, which saves a subtraction for each.
  constexpr int OFFSET = VALUES ? 0 : 128;
  const int M = x_shape[0] * (EACH ? EACH : 1), K = x_shape[1], units = K / 32;
  const int N = weight_shape[EACH ? 1 : 0], words = weight_shape[EACH ? 2 : 1];
  const int lane = PA_LANE, first = (PA_X * NSG + PA_SIMD) * LINES, row0 = PA_Y * ROWS;
  const size_t output0 = EACH ? (size_t)chosen[row0] * N : 0;  // of the row's expert
  const int highs = K / 32 * LOW, scales_at = highs + K / 32 * HIGH;
  PA_SHARED(float, values, 16);
  if (VALUES) {
    if (PA_SIMD == 0 && lane < 16) values[lane] = pa_value_of<(EXPONENT > 0)>(lane);
    PA_SYNC();
  }
  float sum[LINES][ROWS];
  PA_UNROLL for (int l = 0; l < LINES; l++) {
    PA_UNROLL for (int r = 0; r < ROWS; r++) sum[l][r] = 0.0f;
  }
  for (int from = 0; from < units; from += 32 * AHEAD) {
    // Load all, then compute: loads wait for memory together.
    Low low[AHEAD][LINES];
    High high[AHEAD][LINES];
    float factor[AHEAD][LINES], least[AHEAD][LINES];
    unsigned int bytes[AHEAD][LINES];
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int there = from + a * 32 + lane, unit = there < units ? there : 0;
      PA_UNROLL for (int l = 0; l < LINES; l++) {
        const PA_DEVICE unsigned int* line = weight + (output0 + (first + l < N ? first + l : N - 1)) * words;
        low[a][l] = ((const PA_DEVICE Low*)line)[unit];
        if (HIGH > 0) high[a][l] = ((const PA_DEVICE High*)(line + highs))[unit];
        const PA_DEVICE unsigned char* scales = (const PA_DEVICE unsigned char*)(line + scales_at);
        const PA_DEVICE H* given = (const PA_DEVICE H*)(scales + Scales::factors_at(unit));
        const PA_DEVICE unsigned char* of = scales + Scales::bytes_at(unit);
        factor[a][l] = there >= units ? 0.0f : EXPONENT ? 1.0f : float(given[0]);
        least[a][l] = MINS && there < units ? float(given[1]) : 0.0f;
        bytes[a][l] = !SCALED ? 0u : Scales::BYTES == 2 ? *(const PA_DEVICE unsigned short*)of : of[0];
      }
    }
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      const int there = from + a * 32 + lane, unit = there < units ? there : 0;
      float dot[LINES][ROWS], whole[ROWS];
      PA_UNROLL for (int e = 0; e < 4; e++) {
        if (e * 8 % GROUP == 0) {
          PA_UNROLL for (int r = 0; r < ROWS; r++) {
            whole[r] = 0.0f;
            PA_UNROLL for (int l = 0; l < LINES; l++) dot[l][r] = 0.0f;
          }
        }
        float value[ROWS][8];
        PA_UNROLL for (int r = 0; r < ROWS; r++) {
          const size_t row = EACH ? row0 / (EACH ? EACH : 1) : row0 + r < M ? row0 + r : 0;
          const Eight eight = ((const PA_DEVICE Eight*)x)[row * (K / 8) + Codes::eight(unit, e)];
          PA_UNROLL for (int i = 0; i < 8; i++) {
            value[r][i] = float(eight.e[i]);
            if (!VALUES || MINS) whole[r] += value[r][i];
          }
        }
        PA_UNROLL for (int l = 0; l < LINES; l++) {
          PA_UNROLL for (int i = 0; i < 4; i++) {
            const unsigned int two = Codes::pair(low[a][l], high[a][l], e * 4 + i);
            // 128 + code, as the bits of bfloat16
            const unsigned int bits = two | 0x43004300u;
            const float one = VALUES ? values[two & 15u] : pa_float(bits << 16);
            const float other = VALUES ? values[two >> 16] : pa_float(bits & 0xffff0000u);
            PA_UNROLL for (int r = 0; r < ROWS; r++) {
              dot[l][r] += one * value[r][2 * i] + other * value[r][2 * i + 1];
            }
          }
          if ((e + 1) * 8 % GROUP == 0) {
            const int part = e * 8 / GROUP;
            const float scale = Scales::scale(factor[a][l], bytes[a][l], part);
            const float offset = Scales::offset(least[a][l], bytes[a][l], part) - float(OFFSET + ZERO) * scale;
            PA_UNROLL for (int r = 0; r < ROWS; r++) {
              sum[l][r] += scale * dot[l][r];
              if (!VALUES || MINS) sum[l][r] += offset * whole[r];
            }
          }
        }
      }
    }
  }
  PA_UNROLL for (int l = 0; l < LINES; l++) {
    PA_UNROLL for (int r = 0; r < ROWS; r++) {
      PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) sum[l][r] += PA_XOR(sum[l][r], mask);
      if (lane == (l * ROWS + r) % 32 && first + l < N && row0 + r < M) {
        out[(size_t)(row0 + r) * N + first + l] = O(sum[l][r] + (BIAS ? float(bias[output0 + first + l]) : 0.0f));
      }
    }
  }
