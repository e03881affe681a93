"""Steps that measure what `evaluate` puts into its tables: features of sets of pictures, the time that drawing takes.

May import what `steps` may.
"""
