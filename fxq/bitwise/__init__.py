"""Bitwise execution of binary and ternary nets: packed words, XNOR, AND and popcount (``docs/bitwise.md``). Importing it loads nothing."""
