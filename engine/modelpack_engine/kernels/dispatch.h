  // Sort pairs of a row and one of its experts by expert. One simdgroup for each expert: its lanes
  // take turns with the pairs, and count those of earlier experts and of its own.
  //   experts [pairs] uint: EACH of every row   source [pairs] int: rows, by expert
  //   place [pairs] int: the index of each pair in source
  //   sorted [pairs] uint: the experts, in order
  //   spans [SLOTS, 3] int: expert, first place, number of up to TILE pairs, 0 in free slots;
  //   SLOTS is pairs / TILE + EXPERTS, so that an expert knows its slots by the pairs before its own
  const int expert = PA_X * NSG + PA_SIMD, lane = PA_LANE, pairs = experts_shape[0];
  int less = 0, total = 0, before = 0;  // pairs of earlier experts, of this one, and of it in earlier lanes
  constexpr int AHEAD = 8;  // loads that wait for memory together
  for (int from = lane; from < pairs; from += 32 * AHEAD) {
    int found[AHEAD];
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      found[a] = from + a * 32 < pairs ? int(experts[from + a * 32]) : EXPERTS;
    }
    PA_UNROLL for (int a = 0; a < AHEAD; a++) {
      less += found[a] < expert ? 1 : 0;
      total += found[a] == expert ? 1 : 0;
    }
  }
  PA_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
    less += int(PA_XOR(less, mask));
    const int other = int(PA_XOR(total, mask));
    if (lane & mask) before += other;
    total += other;
  }
  if (expert < EXPERTS) {
    int at = less + before;
    for (int from = lane; from < pairs; from += 32 * AHEAD) {
      int found[AHEAD];
      PA_UNROLL for (int a = 0; a < AHEAD; a++) {
        found[a] = from + a * 32 < pairs ? int(experts[from + a * 32]) : EXPERTS;
      }
      PA_UNROLL for (int a = 0; a < AHEAD; a++) {
        if (found[a] == expert) {
          const int i = from + a * 32;
          source[at] = i / EACH;
          place[i] = at;
          sorted[at] = expert;
          at++;
        }
      }
    }
    const int first = less / TILE + expert;
    const int next = expert + 1 < EXPERTS ? (less + total) / TILE + expert + 1 : pairs / TILE + EXPERTS;
    for (int slot = first + lane; slot < next; slot += 32) {
      const int done = (slot - first) * TILE, left = total - done;
      spans[slot * 3] = expert;
      spans[slot * 3 + 1] = less + done;
      spans[slot * 3 + 2] = left <= 0 ? 0 : left < TILE ? left : TILE;
    }
  }
