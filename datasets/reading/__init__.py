"""What is read of stored data: batches of pictures in their order, views, duplicates; prompts and rivals' pictures.

May import `planning` and `formats`.
"""
