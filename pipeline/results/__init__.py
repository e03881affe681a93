"""What an experiment came to, as one plain JSON document: the report and the model card are made of it.

May import `tracking` and what is below it.
"""
