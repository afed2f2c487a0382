"""Training: one step, the loop around it, and the folder a run lives in.

What lives here: optimizer, schedule, losses, balance, metrics, checkpoints in time, signals.
May import: errors, config, plan, ops, model, checkpoint, tokenizer, data; never ``inference``.
Read first: ``trainer.py`` (what one step is), then ``loop.py`` (when what happens).
"""
