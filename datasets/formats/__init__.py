"""How rows lie in files: tar and Parquet shards with receipts, rounding, rewriting.

May import `pictures` and `files`.
"""
