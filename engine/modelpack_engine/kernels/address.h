  // Where an array is; CUDA only.
  //   x [...] T   out [4] int: the low and the high half of its address, (unused)
  const size_t at = (size_t)x;
  if (PA_THREAD == 0) {
    out[0] = int(at & 0xffffffffu);
    out[1] = int(at >> 32);
  }
