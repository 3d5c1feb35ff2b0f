// The order of the elements of rows that `packed_wide` multiplies by codes of BITS bits, [K / 64, rows, 64].
// A lane there multiplies a quarter of a unit of 512 / BITS inputs, and takes two codes of a word at a time:
// (0 4) (1 5) (2 6) (3 7), or (0 2) (1 3) of 8 bits. A chunk of 16 bytes has such a pair of each quarter, and the chunks
// of a line of 128 bytes are exchanged, so that eight lines can be read at a time.
template <int BITS>
struct PaOrder {
  enum { UNIT = 512 / BITS, QUARTER = UNIT / 4 };
  static PA_FUNCTION size_t at(int k, int row, int rows) {
    const int quarter = k % UNIT / QUARTER, piece = k % QUARTER / 8, e = k % 8;
    const int pair = BITS == 4 ? e % 4 : e / 4 * 2 + e % 2, second = BITS == 4 ? e / 4 : e % 4 / 2;
    const int panel = k / UNIT * (UNIT / 64) + piece / 2, chunk = (piece % 2 * 4 + pair) ^ row % 8;
    return ((size_t)panel * rows + row) * 64 + chunk * 8 + quarter * 2 + second;
  }
};
// Put the eight elements of a row from k on in that order.
template <int BITS, typename E>
PA_FUNCTION void pa_put_in_order(E* out, uint4 v, int k, int row, int rows) {
  PA_EACH for (int pair = 0; pair < 4; pair++) {
    const unsigned low = pair < 2 ? v.x : BITS == 4 ? v.y : v.z, high = pair >= 2 ? v.w : BITS == 4 ? v.z : v.y;
    const int first = BITS == 4 ? pair : pair / 2 * 4 + pair % 2;
    *(unsigned*)(out + PaOrder<BITS>::at(k + first, row, rows)) =
        __byte_perm(low, high, pair % 2 ? 0x7632 : 0x5410);
  }
}
