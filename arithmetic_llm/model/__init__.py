"""The model: transformer, tokenizer, adapters, the decoder, and all of it as files."""
