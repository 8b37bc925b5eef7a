"""What measures: rows and contenders, counting, results, tables and pictures."""
