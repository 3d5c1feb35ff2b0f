  // A chunk of 128 inputs of 16 outputs in a block type (blocks.h), and its products on tensor cores; CUDA only. Lane
  // (r, c) has the 32 weights from c * 32 on of outputs r and r + 8, and as many inputs of row r of each eight rows.
  // Sums may have any order, so the tensor cores' inputs 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 are four of these 32.
  typedef PaScaled<T, ZERO, EXPONENT ? EXPONENT : TABLE ? PA_VALUES : PA_CODES> Scaled;
  struct Chunk {
    typename Codes::Low low[2];
    typename Codes::High high[2];
    unsigned bytes[2];
    float factor[2], least[2];
  };
  PA_SHARED(unsigned, values, 16);  // of a TABLE: the caller waits for the threads that write them
  if (TABLE && PA_SIMD == 0 && PA_LANE < 16) values[PA_LANE] = pa_pack<T>(pa_value_of<false>(PA_LANE), 0.0f);
  // Weights 2 i and 2 i + 1 of an eight as numbers for `Scaled`; floats are moved to where a T has such bits.
  auto pair_of = [&](const typename Codes::Low& low, const typename Codes::High& high, int i) {
    if constexpr (EXPONENT > 0) {
      const int by = Scaled::PLACE - Codes::place(i);
      const unsigned word = low.e[i / 4], moved = pa_moved(word, by);
      const unsigned mask = (7u << Scaled::PLACE) * 0x10001u;
      if (by == 15 - Codes::sign(i)) return moved & (mask | 0x80008000u);
      return pa_masked(word << (15 - Codes::sign(i)), 0x80008000u, moved & mask);
    } else {
      const unsigned two = Codes::pair(low, high, i);
      return TABLE ? values[two & 15u] | values[two >> 16] << 16 : two;
    }
  };
  // Read what a lane has of output r + 8 h, in memory or shared memory, where scales of 32 weights are in their plane.
  auto read_line = [&](Chunk& chunk, int h, const void* low, const void* high, const void* scales, int unit) {
    const H* factors = (const H*)((const unsigned char*)scales + Scales::factors_at(unit));
    const unsigned char* bytes = (const unsigned char*)scales + Scales::bytes_at(unit);
    chunk.low[h] = *(const typename Codes::Low*)low;
    if (HIGH > 0) chunk.high[h] = *(const typename Codes::High*)high;
    chunk.factor[h] = EXPONENT ? Scaled::GAIN : float(factors[0]) * Scaled::GAIN;
    chunk.least[h] = MINS ? float(factors[1]) * Scaled::LOSS : 0.0f;
    chunk.bytes[h] = Scales::BYTES == 2 ? *(const unsigned short*)bytes : Scales::BYTES == 1 ? bytes[0] : 0u;
  };
  // Add products, divided by Scaled::WHOLE, to those of each eight rows n; row_of(n, e) are inputs at place e.
  auto multiply_chunk = [&](const Chunk& chunk, auto row_of, auto& acc) {
    uint4 rows[4];
    PA_UNROLL for (int e = 0; e < 4; e++) rows[e] = row_of(0, e);
    Scaled by[2][32 / GROUP];
    PA_UNROLL for (int h = 0; h < 2; h++) {
      PA_UNROLL for (int part = 0; part < 32 / GROUP; part++) {
        by[h][part] = Scaled(Scales::scale(chunk.factor[h], chunk.bytes[h], part),
                             Scales::offset(chunk.least[h], chunk.bytes[h], part));
      }
    }
    PA_UNROLL for (int e = 0; e < 4; e++) {
      unsigned numbers[4][2];
      PA_UNROLL for (int i = 0; i < 4; i++) {
        PA_UNROLL for (int h = 0; h < 2; h++) {
          numbers[i][h] = by[h][e * 8 / GROUP].weights(pair_of(chunk.low[h], chunk.high[h], e * 4 + i));
        }
      }
      const unsigned one[4] = {numbers[0][0], numbers[0][1], numbers[1][0], numbers[1][1]};
      const unsigned two[4] = {numbers[2][0], numbers[2][1], numbers[3][0], numbers[3][1]};
      PA_UNROLL for (int n = 0; n < int(sizeof(acc) / sizeof(acc[0])); n++) {
        const uint4 b = n == 0 ? rows[e] : row_of(n, e);
        pa_mma<T>(acc[n], one, b.x, b.y);
        pa_mma<T>(acc[n], two, b.z, b.w);
      }
    }
  };
