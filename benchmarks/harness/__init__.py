"""Make, time and show the rows that every benchmark consists of."""
