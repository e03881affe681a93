"""What a training reads: which of the stored pictures, in which order, as batches.

May import `planning` and `formats`.
"""
