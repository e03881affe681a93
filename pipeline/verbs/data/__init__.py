"""`data`: what became of the pictures, whether the bytes are still theirs, and where one of them is; a file a verb.

`forgetting` is how `forget` removes pictures. May import what the verbs may; of the other verbs only what they share.
"""
