  // A threadgroup computes up to CHUNK outputs of one layer, for one block of rows. END0 and END1 are where the
  // outputs of layers end. GATED: it computes those of two layers.
#define PA_CHUNKS
  constexpr int FIRST = (END0 + CHUNK - 1) / CHUNK, SECOND = GATED ? 0 : (END1 - END0 + CHUNK - 1) / CHUNK;
  constexpr int GROUPS = FIRST + SECOND + (OUT - END1 + CHUNK - 1) / CHUNK;
  const int block = PA_X / GROUPS, chunk = PA_X % GROUPS;
  const int layer = (chunk >= FIRST) + (chunk >= FIRST + SECOND), product = layer * RANK;
  const int chunks_before = layer == 0 ? 0 : layer == 1 ? FIRST : FIRST + SECOND;
  const int start = (layer == 0 ? 0 : layer == 1 ? END0 : END1) + (chunk - chunks_before) * CHUNK;
  const int end = layer == 0 ? END0 : layer == 1 ? END1 : OUT;
  const int stop = start + CHUNK < end ? start + CHUNK : end;
