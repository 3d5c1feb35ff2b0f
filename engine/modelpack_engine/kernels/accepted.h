  // The rows of each sequence that a draft reads: up to the first after which another token was drawn than proposed.
  // One thread for each sequence.
  //   ids [N, ROWS] int: the drawn tokens   numbers: int positions, slots and proposed tokens, each [N, ROWS], then
  //   others, then lengths [N]
  //   found [N, 1 + TOKENS] int: the number of rows read, in all columns   places [3 TOKENS + 1, N] int: position, slot
  //   and number of keys of each token of the draft; then the index of the last row read
  const int n = ids_shape[0], sequence = PA_THREAD;
  if (sequence < n) {
    const int first = sequence * ROWS, rows = n * ROWS;
    int last = 0;
    while (last + 1 < ROWS && ids[first + last] == numbers[2 * rows + first + last]) last++;
    for (int i = 0; i <= TOKENS; i++) found[sequence * (1 + TOKENS) + i] = last + 1;
    for (int i = 0; i < TOKENS; i++) {
      places[3 * i * n + sequence] = numbers[first + last] + i;
      places[(3 * i + 1) * n + sequence] = numbers[rows + first + last] + i;
      places[(3 * i + 2) * n + sequence] = numbers[numbers_shape[0] - n + sequence] + last + 1 + i;
    }
    places[3 * TOKENS * n + sequence] = first + last;
  }
