  // Put rows of three arrays side by side; each thread copies one vector.
  //   a, b, c [rows, D] T   out [rows, 3 D] T
  typedef PaVec<T, VEC> Vec;
  constexpr int EACH = D / VEC;
  const int line = PA_THREAD / EACH, at = PA_THREAD % EACH, row = line / 3, which = line % 3;
  if (row < a_shape[0]) {
    const PA_DEVICE T* from = which == 0 ? a : which == 1 ? b : c;
    ((PA_DEVICE Vec*)out)[PA_THREAD] = ((const PA_DEVICE Vec*)from)[row * EACH + at];
  }
