"""Plan a merge from headers alone: what becomes of each tensor, its way through memory, and what it costs."""
