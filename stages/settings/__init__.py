"""What a person may set of models, losses, trainings and sampling, checked when it is built.

Without torch, so that `plan` stays quick; imports nothing of the other rooms.
"""
