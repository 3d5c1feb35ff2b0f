  // Copy numbers from the host's page-locked memory; CUDA only.
  //   source [4] int: the low and the high half of its address, a quarter of the numbers, (unused)
  //   out [n] int   done [1] int: order only
  const size_t at = (size_t)(unsigned int)source[1] << 32 | (unsigned int)source[0];
  const int i = PA_THREAD;
  if (i < source[2]) ((int4*)out)[i] = ((const int4*)at)[i];
  if (i == 0) done[0] = 0;
