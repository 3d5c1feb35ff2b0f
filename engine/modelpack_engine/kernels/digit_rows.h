  // One or two rows of strips.h as integers of four signed digits of base 256: a unit's largest input of a row has 30 bits,
  // and the others' bits below it are cut off. Tensor cores multiply bytes of 32 weights by columns of digits. If groups
  // have 16 weights (SIDES is 2), half of the columns are for each group, and the other group's inputs are 0 there.
  constexpr int SIDES = 32 / GROUP, TILES = (ROWS * SIDES + 1) / 2, SUMS = TILES * 2;
  constexpr bool DIRECT = false;  // what one warp reads is of use for others, too
  constexpr int ROWS_BYTES = D * ROWS * 4 + MINS * (D / GROUP * ROWS) * 4 + (UNITS * ROWS + 3) / 4 * 16;
  uint2* given = (uint2*)(pa_memory + STAGES * STAGE);  // [D / 8, ROWS, digits], for each the bytes of eight inputs
  float* whole = (float*)(given + D / 2 * ROWS);        // sums of groups
  float* steps = whole + MINS * (D / GROUP * ROWS);     // [UNITS, ROWS] what 1 stands for
  auto keep = [&](int row, int at, Eight values, bool there) {
    // The 32 lanes of a warp have a unit of one row: all of them are there, or none.
    float sum = 0.0f;
    unsigned largest = 0;
    PA_UNROLL for (int e = 0; e < 8; e++) {
      const float value = there ? float(values.e[e]) : 0.0f;
      const unsigned bits = pa_bits(value) & 0x7fffffffu;
      sum += value;
      largest = bits > largest ? bits : largest;
    }
    PA_UNROLL for (int mask = GROUP / 16; MINS && mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
      const unsigned other = pa_bits(PA_XOR(pa_float(largest), mask));
      largest = other > largest ? other : largest;
    }
    if (!there) return;
    const unsigned exponent = largest >> 23 > 48u ? largest >> 23 : 48u;  // of 2^-79 at least
    const float times = pa_float((283u - exponent) << 23);
    unsigned digits[8], of_digit[2][4];
    PA_UNROLL for (int e = 0; e < 8; e++) {
      digits[e] = (unsigned(int(float(values.e[e]) * times)) + 0x00808080u) ^ 0x00808080u;
    }
    PA_UNROLL for (int i = 0; i < 2; i++) {  // inputs in the order of bytes of weights
      const unsigned* of = digits + (IN_TURN ? i : i * 2);
      const unsigned a = of[0], b = of[IN_TURN ? 2 : 4], y = of[IN_TURN ? 4 : 1], z = of[IN_TURN ? 6 : 5];
      const unsigned ab = __byte_perm(a, b, 0x5140), yz = __byte_perm(y, z, 0x5140);
      const unsigned high_ab = __byte_perm(a, b, 0x7362), high_yz = __byte_perm(y, z, 0x7362);
      of_digit[i][0] = __byte_perm(ab, yz, 0x5410), of_digit[i][1] = __byte_perm(ab, yz, 0x7632);
      of_digit[i][2] = __byte_perm(high_ab, high_yz, 0x5410), of_digit[i][3] = __byte_perm(high_ab, high_yz, 0x7632);
    }
    uint4* to = (uint4*)(given + (place_of(at) * ROWS + row) * 4);
    to[0] = {of_digit[0][0], of_digit[1][0], of_digit[0][1], of_digit[1][1]};
    to[1] = {of_digit[0][2], of_digit[1][2], of_digit[0][3], of_digit[1][3]};
    if (MINS && at % (GROUP / 8) == 0) whole[place_of(at) / (GROUP / 8) * ROWS + row] = sum;
    // An infinite input or one that is not a number makes all of its row's products so.
    const unsigned step = exponent == 255u ? 0x7fc00000u : (exponent - (29u + SHIFT)) << 23;
    if (lane == 0) steps[at / 32 * ROWS + row] = pa_float(step);
  };
  struct Own {
    uint2 rows[KEPT ? TILES * 8 : 1];
    float steps[TILES];
  };
  // The row of a lane's columns in a tile.
  auto row_in = [&](int tile) { return SIDES == 2 ? tile : c / 2 % ROWS; };
  auto row_at = [&](int unit, int v) {
    const int column = v / 8 * 2 + r / 4, row = column / SIDES, half = column % SIDES;
    const bool used = row < ROWS && (SIDES == 1 || half == c / 2);
    const uint2 found = given[((unit * 32 + v % 8 * 4 + c) * ROWS + row % ROWS) * 4 + r % 4];
    return used ? found : uint2{0u, 0u};
  };
  auto read = [&](auto&&...) {};
  auto recall = [&](Own& own, int unit) {
    PA_UNROLL for (int v = 0; KEPT && v < TILES * 8; v++) own.rows[KEPT ? v : 0] = row_at(unit, v);
    PA_UNROLL for (int t = 0; t < TILES; t++) {
      own.steps[t] = steps[unit * ROWS + row_in(t)] * (c % 2 ? 65536.0f : 1.0f);
    }
  };
  auto rows_of = [&](const Own& own, int unit, int v) { return KEPT ? own.rows[KEPT ? v : 0] : row_at(unit, v); };
  // The sum of a lane's group of 32 inputs; one of two lanes has it.
  auto sum_of = [&](const Own&, int unit, int i, int tile) {
    const float sum = whole[((unit * 8 + i) * SIDES + (SIDES == 2 ? c / 2 : 0)) * ROWS + row_in(tile)];
    return c % 2 ? 0.0f : sum;
  };
  auto finish = [&](float (&acc)[SUMS], float* sums) {
    PA_UNROLL for (int i = 0; i < SUMS; i++) {
      acc[i] += PA_XOR(acc[i], 1);
      if (SIDES == 2) acc[i] += PA_XOR(acc[i], 2);
      const int row = SIDES == 2 ? i / 2 : c / 2;
      if (c % 2 == 0 && (SIDES == 1 || c == 0) && row < ROWS) sums[row * 16 + i % 2 * 8 + r] = acc[i];
      acc[i] = 0.0f;
    }
  };
