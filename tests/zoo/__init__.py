"""The acceptance zoo: what kdsurgeon is held to, on every model that can be had by name."""
