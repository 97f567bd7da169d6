"""Keepless inside the tools that run training loops: one file for each, which imports its library when it is imported.

Nothing below imports them, and `import keepless` imports none of them::

    from keepless.integrations.hf import KeeplessCallback          # Trainer of transformers, and TRL's
"""
