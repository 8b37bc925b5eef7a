"""Time the rows of contenders that every benchmark consists of, and show what was found."""
