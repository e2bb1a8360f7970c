"""What follows distillation: fine-tuning on traces (``sft``) and averaging of checkpoints (``merge``)."""
