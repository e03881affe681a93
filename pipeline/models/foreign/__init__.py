"""Models of others that run as they are, by the libraries that know them.

May import what `models` may.
"""
