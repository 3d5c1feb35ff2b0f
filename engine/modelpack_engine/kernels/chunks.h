  // A threadgroup computes up to CHUNK outputs of one layer, for one block of rows. END0, END1 and END2 are where
  // the outputs of layers end. GATED: it computes those of two layers.
#define PA_CHUNKS
  constexpr int FIRST = (END0 + CHUNK - 1) / CHUNK, SECOND = GATED ? 0 : (END1 - END0 + CHUNK - 1) / CHUNK;
  constexpr int THIRD = (END2 - END1 + CHUNK - 1) / CHUNK, AFTER = FIRST + SECOND, LAST = AFTER + THIRD;
  constexpr int GROUPS = LAST + (OUT - END2 + CHUNK - 1) / CHUNK;
  const int block = PA_X / GROUPS, chunk = PA_X % GROUPS;
  const int layer = (chunk >= FIRST) + (chunk >= AFTER) + (chunk >= LAST), product = layer * RANK;
  const int chunks_before = layer == 0 ? 0 : layer == 1 ? FIRST : layer == 2 ? AFTER : LAST;
  const int begin = layer == 0 ? 0 : layer == 1 ? END0 : layer == 2 ? END1 : END2;
  const int start = begin + (chunk - chunks_before) * CHUNK;
  const int end = layer == 0 ? END0 : layer == 1 ? END1 : layer == 2 ? END2 : OUT;
  const int stop = start + CHUNK < end ? start + CHUNK : end;
