"""Where rows and pictures come from: the table of sources, a file a source.

May import `pictures` and `files`.
"""
