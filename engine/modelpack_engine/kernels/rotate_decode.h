  // Decode attention (decode.h, the text after this one) of rows that are not rotated yet, as rotate.h does it: queries
  // and keys are normed (QKNORM) and rotated, and keys and values written to the pools in place.
  //   joint [PARTS, rows, (HK*G + 2 * HK) * DK] J; with OWN_VALUES, it has no values
  //   values [rows, HK * DK] A, with OWN_VALUES   positions, slots [rows] int   inverse [DIMS / 2] float
  //   q_weight, k_weight [DK] W: of the norms   EPSILON, FACTOR (of rotated elements): floats' bits
  //   k_pool, v_pool, block_tables, context_lens, sinks, params, out, stats: see decode.h
  //   previous [1] int: order only   token [1] int, always 0: orders later readers of the pools
  // A row's own token is the last one of its context, in its slot, and no other row attends to it. So all else that
  // it attends to was written by earlier steps, and is read before this kernel waits for the one before. Heads are whole vectors: DK and DV
  // are equal, and a multiple of VEC * LPT; pools are neither latent nor quantised, and HEADS divides G.
#define PA_ROTATES
  constexpr int TURNED = DIMS / 2, RUNS = DK / 2, EACH = (RUNS + 31) / 32;
