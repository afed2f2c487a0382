"""What a model is worth, in numbers: bits per byte, recall, grammar, and three memory tasks.

Lives here: losses token by token and the arithmetic on them, BLiMP, the synthetic tasks.
May import: errors, config, model, checkpoint, tokenizer, data, inference; never training.
Read first: ``token_losses.py``; ``synthetic.py`` stands alone.
"""
