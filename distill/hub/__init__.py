"""What goes to a model hub: a folder with weights, tokenizer and model card, and if wanted the code that runs it."""
