"""Random classifiers, what must hold of every surgery on them, and faults that must be noticed."""
