"""Backends: one file each, whose name is the registered name.

Each has ``lm(model, tokenizer, batch_size) -> lm_eval LM`` for accuracy and ``Decoder(model, batch, context, steps)``
for throughput.
"""
