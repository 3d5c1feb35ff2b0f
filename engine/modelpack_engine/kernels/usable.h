  // Mark the tokens of rows without a valid choice, whose maximum is NaN or infinite.
  //   token_ids [rows] int   maxima [rows] T   usable [rows] int, -1 if marked   next [rows] int, 0
  const int row = PA_THREAD;
  if (row < token_ids_shape[0]) {
    const float most = float(maxima[row]);
    const int token = most - most == 0.0f ? token_ids[row] : -1;
    usable[row] = token;
    next[row] = token < 0 ? 0 : token;
  }
