"""How fast every op is, against the expression people write without it and against the memory."""
