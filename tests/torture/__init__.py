"""A run under torture: killed, refused, without power, damaged; nothing may be lost in silence.

Each part works with a fault put into the writer on purpose as well: it is worth what it notices.
"""
