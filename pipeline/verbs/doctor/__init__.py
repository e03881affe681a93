"""`doctor`: does this machine have what a run needs? Each check says what it found and what to do.

With a conf the checks are about that: whether it could run here, or as much as can be told without its cluster. May
import what the verbs may; no other verb imports it.
"""
