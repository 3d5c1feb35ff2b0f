  // SwiGLU of a joint projection: silu(gate) * up; each thread computes one vector.
  //   joint [rows, 2 * N] T: gate, then up   out [rows, N] T
  typedef PaVec<T, VEC> Vec;
  constexpr int EACH = N / VEC;
  const int row = PA_THREAD / EACH, at = PA_THREAD % EACH;
  if (row < joint_shape[0]) {
    const PA_DEVICE Vec* from = (const PA_DEVICE Vec*)joint + (size_t)row * 2 * EACH;
    const Vec gate = from[at], up = from[EACH + at];
    Vec y;
    PA_UNROLL for (int e = 0; e < VEC; e++) {
      const float g = float(gate.e[e]);
      y.e[e] = T(float(T(g / (1.0f + PA_EXP2(-1.44269504f * g)))) * float(up.e[e]));
    }
    ((PA_DEVICE Vec*)out)[(size_t)row * EACH + at] = y;
  }
