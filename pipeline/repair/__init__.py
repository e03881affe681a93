"""What is damaged of finished artifacts is found, and of it alone is made anew what can be.

Makes by a run what it has opened; may import every room but `verbs`.
"""
