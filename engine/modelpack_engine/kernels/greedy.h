  // The most likely token of each row, after `most_likely`.
  //   token [R] int: -1 if there is none   next [R] int: the same, with 0 for -1
  if (index == 0) {
    token[row] = best;
    next[row] = best < 0 ? 0 : best;
  }
