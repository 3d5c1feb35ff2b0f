  // RMS norms (https://arxiv.org/abs/1910.07467) of the groups of a row, with a gate: a simdgroup takes
  // the D elements of a group. Without BEFORE, the norm is multiplied by the gate's SiLU; with it, the
  // row is, before the norm. EPSILON has the bits of a float.
  //   x [rows, C] T   gate [rows, WIDTH] T   columns [C / D] int: the first column of a group's gate
  //   weight [SAME ? D : C] W   out [rows, C] T
  constexpr int EACH = D / 32 / VEC, GROUPS = C / D;
  typedef PaVec<T, VEC> Vec;
  const int lane = PA_LANE, cell = PA_X * NSG + PA_SIMD, row = cell / GROUPS, group = cell % GROUPS;
  if (row < x_shape[0]) {
    float kept[EACH][VEC], by[EACH][VEC], squares = 0.0f;
    PA_UNROLL for (int i = 0; i < EACH; i++) {
      const int at = (i * 32 + lane) * VEC;
      const Vec in = *(const PA_DEVICE Vec*)(x + (size_t)row * C + group * D + at);
      const Vec factor = *(const PA_DEVICE Vec*)(gate + (size_t)row * WIDTH + columns[group] + at);
      PA_UNROLL for (int e = 0; e < VEC; e++) {
        const float g = float(factor.e[e]), activated = g / (1.0f + PA_EXP2(-1.44269504f * g));
        kept[i][e] = float(in.e[e]) * (BEFORE ? activated : 1.0f);
        by[i][e] = float(weight[(SAME ? 0 : group * D) + at + e]) * (BEFORE ? 1.0f : activated);
        squares += kept[i][e] * kept[i][e];
      }
    }
    PA_UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += PA_XOR(squares, mask);
    const float factor = PA_RSQRT(squares / D + pa_float(EPSILON));
    PA_UNROLL for (int i = 0; i < EACH; i++) {
      Vec y;
      PA_UNROLL for (int e = 0; e < VEC; e++) y.e[e] = T(kept[i][e] * factor * by[i][e]);
      *(PA_DEVICE Vec*)(out + (size_t)row * C + group * D + (i * 32 + lane) * VEC) = y;
    }
  }
