  // The rows of strips.h as numbers of the type T. The text before has of a unit's weights:
  //   VECTORS: the eights of a row that each of four lanes multiplies   vector_of, lane_of (eight): where they are
  //   eight_at(vector, lane): the eight that is there   arranged(values): its values in the order of codes
  //   SUMMED: sums of groups of inputs are needed, of which a unit has GROUPS
  //   multiply_unit has sums as pa_mma has them
  constexpr bool DIRECT = KEPT && ROWS > 1;  // it reads them itself, and shared memory has weights instead
  constexpr int SUMS = 4;
  constexpr int ROWS_BYTES = DIRECT ? 0 : D * ROWS * 2 + SUMMED * (D / GROUP * ROWS) * 4;
  uint4* given = (uint4*)(pa_memory + STAGES * STAGE);  // the rows, in the order in which lanes read them
  unsigned* whole = (unsigned*)(given + D / 8 * ROWS);  // the two numbers of each sum of a group
  // A sum as two numbers, the second of which is what the first one lacks.
  auto in_two = [&](float sum) {
    const float most = float(__nv_bfloat16(sum));
    return pa_pack<__nv_bfloat16>(most, sum - most);
  };
  auto keep = [&](int row, int at, Eight values, bool there) {
    float sum = 0.0f;
    if (there) {
      PA_UNROLL for (int e = 0; SUMMED && e < 8; e++) sum += float(values.e[e]);
      given[(vector_of(at) * ROWS + row) * 4 + lane_of(at)] = arranged(*(const uint4*)&values);
    }
    PA_UNROLL for (int mask = GROUP / 16; SUMMED && mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    if (SUMMED && there && at % (GROUP / 8) == 0) whole[at / (GROUP / 8) * ROWS + row] = in_two(sum);
  };
  struct Own {
    uint4 rows[KEPT ? VECTORS : 1];
    uint2 sums;
  };
  auto row_at = [&](int vector) { return given[(vector * ROWS + r % ROWS) * 4 + c]; };
  // A lane's sums, of two groups that follow each other: first numbers are multiplied by the offsets of all groups, then
  // second ones, and zeros by the others.
  auto sums_of = [&](unsigned one, unsigned other) {
    const unsigned first = __byte_perm(one, other, 0x5410), second = __byte_perm(one, other, 0x7632);
    auto turn = [&](int k) { return k / GROUPS == 0 ? first : k / GROUPS == 1 ? second : 0u; };
    return uint2{turn(c * 2), turn(c * 2 + 8)};
  };
  auto sums_at = [&](int unit) {
    const unsigned* of = whole + (unit * GROUPS + c * 2 % GROUPS) * ROWS + r % ROWS;
    return sums_of(of[0], of[ROWS]);
  };
  // Keep a unit of M rows that begin so many elements apart.
  constexpr int OF_GROUP = SUMMED ? VECTORS / GROUPS : 1;  // a lane's eights of a group
  auto read = [&](Own& own, int unit, const T* rows, int apart, int M) {
    const int row = r % ROWS;
    float sum = 0.0f, mine[2] = {};
    PA_UNROLL for (int v = 0; v < (DIRECT ? VECTORS : 0); v++) {
      Eight eight;
      PA_UNROLL for (int e = 0; e < 8; e++) eight.e[e] = T(0.0f);
      if (row < M) eight = ((const Eight*)(rows + (size_t)row * apart))[eight_at(unit * VECTORS + v, c)];
      own.rows[KEPT ? v : 0] = arranged(*(const uint4*)&eight);
      if (!SUMMED) continue;
      PA_UNROLL for (int e = 0; e < 8; e++) sum += float(eight.e[e]);
      if ((v + 1) % OF_GROUP != 0) continue;
      PA_UNROLL for (int mask = 1; mask < 4; mask *= 2) sum += PA_XOR(sum, mask);
      if (v / OF_GROUP / 2 == c % (GROUPS / 2)) mine[v / OF_GROUP % 2] = sum;
      sum = 0.0f;
    }
    if (SUMMED) own.sums = sums_of(in_two(mine[0]), in_two(mine[1]));
  };
  auto recall = [&](Own& own, int unit) {
    if constexpr (KEPT && !DIRECT) {
      PA_UNROLL for (int v = 0; v < VECTORS; v++) own.rows[v] = row_at(unit * VECTORS + v);
      if (SUMMED) own.sums = sums_at(unit);
    }
  };
  auto rows_of = [&](const Own& own, int unit, int v) { return KEPT ? own.rows[KEPT ? v : 0] : row_at(unit * VECTORS + v); };
  auto sum_of = [&](const Own& own, int unit) { return KEPT ? own.sums : sums_at(unit); };
  auto finish = [&](float (&acc)[4], float* sums) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int row = c * 2 + i % 2;
      if (row < ROWS) sums[row * 16 + i / 2 * 8 + r] = acc[i];
      acc[i] = 0.0f;
    }
  };
