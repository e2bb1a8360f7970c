"""The hybrid: config and model that Hugging Face tools load, and the surgery that makes one from a teacher."""
