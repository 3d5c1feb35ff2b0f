// Codes of four weights as the bytes of a word, for CUDA's tensor cores: those of a plane of BITS (blocks.h) at the bits
// from TO on of each byte.
template <int BITS, int TO>
struct PaPlane {
  // The eights of a word; a lane's one is moved to the highest bits.
  enum : unsigned { EACH = 4 / BITS, FIRST = (EACH - 1) * 2 * BITS, MASK = ((1u << BITS) - 1u) * 0x01010101u << TO };
  enum : unsigned { HIGHEST = 0xffffffffu / ((1u << BITS) - 1u) << (BITS - 1) };  // bits of all codes of a word
  // By a product: there are as many units for products as for shifts, and these have less to do.
  static __device__ inline unsigned word(const void* plane, int i, int c) {
    const unsigned times = (EACH == 4 ? 0x01041040u : EACH == 2 ? 0x01100110u : 0x01010101u) >> c * 8 & 255u;
    return ((const unsigned*)plane)[i * BITS + c / EACH] * times;
  }
  // The codes of weights 0, 4, 1 and 5 of an eight, or 2, 6, 3 and 7.
  static __device__ inline unsigned bytes(unsigned word, int i) {
    return pa_moved(word, TO - int(FIRST) - BITS * i) & MASK;
  }
};
// The bytes of the table's 16 values for the codes of weights 0, 2, 4 and 6 of an eight, or of 1, 3, 5 and 7.
__device__ inline unsigned pa_bytes_of_table(unsigned word, int odd) {
  const unsigned of_eight = (word & 0x77777777u) >> 16 * odd;
  const unsigned choice = pa_masked(word >> 1, 0x44444444u, 0x32103210u) >> 16 * odd;
  const unsigned low = pa_pick_bytes(pa_four_values(0), pa_four_values(1), of_eight);
  const unsigned high = pa_pick_bytes(pa_four_values(2), pa_four_values(3), of_eight);
  return pa_pick_bytes(low, high, choice);
}
