  // The rows of strips.h as numbers of the type T. The text before has of a unit's weights:
  //   VECTORS: the eights of a row that each of four lanes multiplies   vector_of, lane_of (eight): where they are
  //   eight_at(vector, lane): the eight that is there   arranged(values): its values in the order of codes
  //   SUMMED: sums of groups of inputs are needed, of which a unit has GROUPS
  //   multiply_unit has sums as pa_mma has them
  constexpr bool KEPT_SUMS = SUMMED && KEPT && GROUPS <= 4;  // more would take too many registers
  constexpr bool DIRECT = KEPT && ROWS > 1;  // it reads them itself, and shared memory has weights instead
  constexpr int COLUMNS = ROWS == 1 ? 1 : 2, SUMS = 4;       // the rows that a lane has sums of
  constexpr int ROWS_BYTES = (DIRECT ? 0 : D * ROWS * 2) + SUMMED * (D / GROUP * ROWS) * 4;
  uint4* given = (uint4*)(pa_memory + STAGES * STAGE);  // the rows, in the order in which lanes read them
  float* whole = (float*)(given + (DIRECT ? 0 : D / 8 * ROWS));  // sums of their groups
  auto keep = [&](int row, int at, Eight values, bool there) {
    float sum = 0.0f;
    if (there) {
      PA_UNROLL for (int e = 0; SUMMED && e < 8; e++) sum += float(values.e[e]);
      given[(vector_of(at) * ROWS + row) * 4 + lane_of(at)] = arranged(*(const uint4*)&values);
    }
    PA_UNROLL for (int mask = GROUP / 16; SUMMED && mask > 0; mask /= 2) sum += PA_XOR(sum, mask);
    if (SUMMED && there && at % (GROUP / 8) == 0) whole[at / (GROUP / 8) * ROWS + row] = sum;
  };
  struct Own {
    uint4 rows[KEPT ? VECTORS : 1];
    float sums[KEPT_SUMS ? GROUPS : 1][COLUMNS];
  };
  auto row_at = [&](int vector) { return given[(vector * ROWS + r % ROWS) * 4 + c]; };
  auto sum_at = [&](int group, int h) { return whole[group * ROWS + (ROWS == 1 ? 0 : (c * 2 + h) % ROWS)]; };
  // Keep a unit of M rows that begin so many elements apart.
  constexpr int OF_GROUP = SUMMED ? VECTORS / GROUPS : 1;  // a lane's eights of a group
  auto read = [&](Own& own, int unit, const T* rows, int apart, int M) {
    const int row = r % ROWS;
    float sum = 0.0f;
    PA_UNROLL for (int v = 0; v < (DIRECT ? VECTORS : 0); v++) {
      Eight eight;
      PA_UNROLL for (int e = 0; e < 8; e++) eight.e[e] = T(0.0f);
      if (row < M) eight = ((const Eight*)(rows + (size_t)row * apart))[eight_at(unit * VECTORS + v, c)];
      own.rows[KEPT ? v : 0] = arranged(*(const uint4*)&eight);
      if (!SUMMED) continue;
      PA_UNROLL for (int e = 0; e < 8; e++) sum += float(eight.e[e]);
      if ((v + 1) % OF_GROUP != 0) continue;
      PA_UNROLL for (int mask = 1; mask < 4; mask *= 2) sum += PA_XOR(sum, mask);
      if (c == 0 && r < ROWS) whole[(unit * GROUPS + v / OF_GROUP) * ROWS + row] = sum;
      sum = 0.0f;
    }
    pa_sync_warp();
  };
  auto recall = [&](Own& own, int unit) {
    if constexpr (KEPT) {
      PA_UNROLL for (int v = 0; v < (DIRECT ? 0 : VECTORS); v++) own.rows[v] = row_at(unit * VECTORS + v);
      PA_UNROLL for (int i = 0; KEPT_SUMS && i < GROUPS * COLUMNS; i++) {
        own.sums[KEPT_SUMS ? i / COLUMNS : 0][i % COLUMNS] = sum_at(unit * GROUPS + i / COLUMNS, i % COLUMNS);
      }
    }
  };
  auto rows_of = [&](const Own& own, int unit, int v) { return KEPT ? own.rows[KEPT ? v : 0] : row_at(unit * VECTORS + v); };
  auto sum_of = [&](const Own& own, int unit, int g, int h) {
    return KEPT_SUMS ? own.sums[KEPT_SUMS ? g : 0][h] : sum_at(unit * GROUPS + g, h);
  };
  auto finish = [&](float (&acc)[4], float* sums) {
    PA_UNROLL for (int i = 0; i < 4; i++) {
      const int row = c * 2 + i % 2;
      if (row < ROWS) sums[row * 16 + i / 2 * 8 + r] = acc[i];
      acc[i] = 0.0f;
    }
  };
