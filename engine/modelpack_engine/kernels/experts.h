  // Matmuls of rows with the weights of their experts, by product.h: each block multiplies a tile of up
  // to MT rows of one expert, in one part. With SWIGLU, the weights of the up projection are the inputs
  // that end in _up.
  //   x [M, ...] T, K elements per row: with GATHER in the original order, otherwise sorted by expert
  //   source, spans: see dispatch.h
  //   weight [EXPERTS, N, K] T, or packed; scales, biases and bias like product.h's, of each expert
  //   out [pairs, N] O, sorted by expert
#define PA_EXPERTS
  const int* const span = spans + blockIdx.y * 3;
  const int rows = span[2], N = weight_shape[1], packed = weight_shape[2], width = N;
  if (rows == 0) return;
  const size_t first_line = (size_t)span[0] * N, first_row = span[1];
#define PA_SOURCE(row) (GATHER ? source[row] : (row))
#define PA_OF(name, i) (SWIGLU && (i) >= 32 ? name##_up : name)
#define PA_LINE(i) (first + (SWIGLU ? (i) % 32 : (i)))
