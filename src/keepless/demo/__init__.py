"""The demo: a small GPT-2 learns English four ways, inside and outside a memory budget.

`python -m keepless.demo` or `keepless demo`. It measures what Keepless promises on the machine at hand: peaks by the
deciding meter in processes of their own, times of steps taken in turn, losses and parameters compared bit by bit.
"""
