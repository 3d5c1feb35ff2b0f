  // A block type (blocks.h), by the template arguments.
  typedef PaBlocks<LOW, HIGH, (EXPONENT > 0)> Codes;
  typedef PaScales<GROUP, BLOCK, SCALED, MINS, EXPONENT> Scales;
  constexpr bool VALUES = TABLE || EXPONENT;  // codes stand for values of their own, without ZERO
