"""The arithmetic of pruning: pure functions of tensors and numbers, no modules, no state.

Shapes used throughout: B rows (samples), S tokens, D hidden size, H query heads, G key/value heads, d head size,
C channels of a block's input to its output matrix (H*d in attention, the MLP width in the MLP), U units (what is
pruned: heads, key/value groups or MLP channels), P positions. The probe has b rows and s tokens.
Statistics, scores and histories are float32 whatever the model's dtype.
"""
