  // The next token of a draft, after `most_likely`: that of the most likely column.
  //   before [R, COLUMNS] int   tokens [V] int: the token of each column, 0 if there is no most likely one
  //   found [R, COLUMNS] int: `before` without its first column, and the token
  if (index == 0) {
    PA_UNROLL for (int i = 1; i < COLUMNS; i++) found[row * COLUMNS + i - 1] = before[row * COLUMNS + i];
    found[row * COLUMNS + COLUMNS - 1] = best < 0 ? 0 : tokens[best];
  }
