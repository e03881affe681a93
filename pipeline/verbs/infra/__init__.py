"""`infra`: the files that hand a run to a platform. May import what the verbs may; no other verb imports it.

`templates/<platform>/` holds the files of a platform, with the names that they get.
"""
