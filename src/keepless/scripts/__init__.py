"""Unmodified training scripts, with a plan put into the model that they train.

A script is run as `python` runs it (`process`). While the model is looked for, training calls of outermost modules are
deferred: they save nothing for the backward (`deferred`). The first backward that reaches such a call tells which model
is trained, and what the script's own loss needs (`losses`); the model is planned before that backward begins
(`first_step`), and the deferred call is run again by the plan.
"""
