"""Ray: tasks, actor pools, training ranks and what guards them.

The only home of ray; may import `models` and what is below it.
"""
