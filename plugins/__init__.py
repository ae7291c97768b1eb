"""Plugins that ship with kdsurgeon: one file each, over its public names only."""
