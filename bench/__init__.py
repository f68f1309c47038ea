"""How fast ops, attacks and alignment are, against what people use without them and against the hardware."""
