  // A block type (blocks.h), by the template arguments.
  typedef PaBlocks<LOW, HIGH> Codes;
  typedef PaScales<GROUP, SCALED, MINS, EXPONENTS> Scales;
