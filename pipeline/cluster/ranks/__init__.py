"""The ranks of a training: what each does, saves and tells. May import what the room of the cluster may."""
