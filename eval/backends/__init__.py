"""Backends: one file each (more than one comes later).

Each has ``lm(model, tokenizer, batch_size) -> lm_eval LM`` for accuracy and ``Decoder(model, batch, context)``
for throughput.
"""
