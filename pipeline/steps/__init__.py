"""What each step of the DAG does: a file a kind of step, with functions `(Build) -> Facts`.

Steps meet only in artifacts: none imports another, all may import `build` and the rooms below.
"""
