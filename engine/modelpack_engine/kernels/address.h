  // Where eight arrays are; CUDA only.
  //   a ... h [...] uint8   out [16] int: the low and the high half of each address
  const size_t at[8] = {(size_t)a, (size_t)b, (size_t)c, (size_t)d,
                        (size_t)e, (size_t)f, (size_t)g, (size_t)h};
  if (PA_THREAD < 8) {
    out[2 * PA_THREAD] = int(at[PA_THREAD] & 0xffffffffu);
    out[2 * PA_THREAD + 1] = int(at[PA_THREAD] >> 32);
  }
