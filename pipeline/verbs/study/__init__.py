"""`study`: what people prefer. A page of blind pairs of pictures, and the count of the answers that it gives.

The pairs and the count are pure; `verb` reads and writes. May import what the verbs may; no other verb imports it.
"""
