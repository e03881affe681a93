"""Getting pictures from the web: one guarded request, one shard.

May import `planning` and `formats`.
"""
