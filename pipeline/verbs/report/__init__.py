"""`report`: an experiment as one page that needs nothing else, and the device-hour table of a root.

May import what the verbs may; of the other verbs only what they share.
"""
